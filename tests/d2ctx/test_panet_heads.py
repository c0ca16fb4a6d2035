"""PANet's heads: all levels pooled, fused by the maximum, masks with a fully connected path."""

import pytest
import torch
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import build_box_head, build_mask_head, build_roi_heads
from detectron2.structures import Boxes
from torch import nn

from d2ctx import UserError
from d2ctx.panet_heads import PANetBoxHead, PANetMaskHead
from d2ctx.panet_layers import AllLevelPooler, FusedConv
from tests.d2ctx import tiny
from tests.d2ctx.context_parts import config, detections, idle, mixed_sizes, model, step

AH = "fpt/mask_rcnn_fpt_ah_instant.yaml"
LEVELS = ("p2", "p3", "p4", "p5")
SHAPE = ShapeSpec(channels=8, height=4, width=4)


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def box_head(**options):
    torch.manual_seed(0)
    sizes = {"levels": LEVELS, "conv_dims": [6, 6, 6], "fc_dims": [10], "conv_norm": ""}
    return PANetBoxHead(SHAPE, **sizes | options)


def mask_head(**options):
    torch.manual_seed(0)
    sizes = {"levels": LEVELS, "num_classes": 3, "conv_dim": 6, "num_conv": 4, "conv_norm": ""}
    return PANetMaskHead(SHAPE, **sizes | options)


# ---- parts -----------------------------------------------------------------------------------
def test_every_region_is_pooled_from_every_level():
    features = [draw(2, 8, 64 // 2**i, 96 // 2**i) for i in range(4)]
    boxes = [Boxes(torch.tensor([[8.0, 8, 100, 90], [0, 0, 20, 10]])),
             Boxes(torch.tensor([[300.0, 200, 380, 255]]))]  # fmt: skip
    scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    pooler = AllLevelPooler(
        output_size=4, scales=scales, sampling_ratio=2, pooler_type="ROIAlignV2"
    )
    found = pooler(features, boxes)
    assert found.shape == (3, 4, 8, 4, 4)
    for level, (x, scale) in enumerate(zip(features, scales, strict=True)):
        one = ROIPooler(4, [scale], sampling_ratio=2, pooler_type="ROIAlignV2")
        torch.testing.assert_close(found[:, level], one([x], boxes))
    # Detectron2 takes each region from one level only, a small one from the finest.
    usual = ROIPooler(4, scales, sampling_ratio=2, pooler_type="ROIAlignV2")(features, boxes)
    torch.testing.assert_close(found[1, 0], usual[1])


def test_fusion_is_the_largest_value_of_convolutions_of_their_own():
    fuse, x = FusedConv(in_channels=8, out_channels=5, levels=LEVELS, norm=""), draw(2, 4, 8, 4, 4)
    expected = torch.full((2, 5, 4, 4), -float("inf"))
    for level, name in enumerate(LEVELS):
        conv = fuse.convs[name]
        for region in range(2):
            y = nn.functional.conv2d(x[region, level], conv.weight, conv.bias, padding=1)
            expected[region] = torch.maximum(expected[region], y.clamp(min=0))
    torch.testing.assert_close(fuse(x), expected)


def test_fusion_does_not_know_the_order_of_equal_convolutions():
    fuse, x = FusedConv(in_channels=8, out_channels=5, levels=LEVELS, norm=""), draw(2, 4, 8, 4, 4)
    for conv in fuse.convs.values():
        conv.load_state_dict(fuse.convs["p2"].state_dict())
    torch.testing.assert_close(fuse(x), fuse(x.flip(1)))


def test_box_head_equals_its_definition():
    head, x = box_head(), draw(3, 4, 8, 4, 4)
    y = torch.stack([head.fuse.convs[n](x[:, i]) for i, n in enumerate(LEVELS)]).amax(0)
    for conv in head.convs:
        y = nn.functional.conv2d(y, conv.weight, conv.bias, padding=1).clamp(min=0)
    fc = head.fcs[1]
    torch.testing.assert_close(head(x), (y.flatten(1) @ fc.weight.T + fc.bias).clamp(min=0))
    assert (len(head.convs), head.output_shape) == (2, ShapeSpec(channels=10))


def test_mask_head_equals_its_definition():
    head, x = mask_head(), draw(3, 4, 8, 4, 4)
    nn.init.normal_(head.fc.weight, std=0.1)
    y = torch.stack([head.fuse.convs[n](x[:, i]) for i, n in enumerate(LEVELS)]).amax(0)
    assert len(head.shared) == 2
    for conv in head.shared:
        y = nn.functional.conv2d(y, conv.weight, conv.bias, padding=1).clamp(min=0)
    main = nn.functional.conv2d(y, head.conv.weight, head.conv.bias, padding=1).clamp(min=0)
    main = nn.functional.conv_transpose2d(main, head.deconv.weight, head.deconv.bias, stride=2)
    masks = nn.functional.conv2d(main.clamp(min=0), head.predictor.weight, head.predictor.bias)
    for conv in head.fc_convs:
        y = nn.functional.conv2d(y, conv.weight, conv.bias, padding=1).clamp(min=0)
    added = (y.flatten(1) @ head.fc.weight.T + head.fc.bias).view(3, 1, 8, 8)
    found = head.layers(x)
    assert found.shape == (3, 3, 8, 8)
    torch.testing.assert_close(found, masks + added)
    assert (added < 0).any()  # background, too, can be added


def test_no_region_is_no_error():
    x = draw(0, 4, 8, 4, 4)
    assert box_head()(x).shape == (0, 10)
    assert mask_head().layers(x).shape == (0, 3, 8, 8)
    assert mask_head(conv_dim=64, conv_norm="GN").layers(x).shape == (0, 3, 8, 8)


def test_parameters_at_full_width():
    cfg = config("fpt/mask_rcnn_r50_fpt_ah_1x.yaml")
    conv = 9 * 256 * 256 + 2 * 256  # without a bias, with GN
    with torch.device("meta"):
        box = build_box_head(cfg, ShapeSpec(channels=256, height=7, width=7))
        mask = build_mask_head(cfg, ShapeSpec(channels=256, height=14, width=14))
    counts = [sum(p.numel() for p in head.parameters()) for head in (box, mask)]
    half = 9 * 256 * 128 + 2 * 128
    fc = 128 * 14 * 14 * 784 + 784
    deconv, predictor = 4 * 256 * 256 + 256, 256 * 80 + 80
    assert counts == [
        (4 + 3) * conv + 7 * 7 * 256 * 1024 + 1024,
        (4 + 3) * conv + deconv + predictor + conv + half + fc,
    ]


# ---- from YAML -------------------------------------------------------------------------------
def test_yaml_builds_what_it_says():
    heads = model(AH).roi_heads
    assert isinstance(heads.box_pooler, AllLevelPooler)
    assert isinstance(heads.mask_pooler, AllLevelPooler)
    assert list(heads.box_head.fuse.convs) == list(LEVELS)
    assert (heads.box_pooler.output_size, heads.mask_pooler.output_size) == ((7, 7), (14, 14))
    assert len(heads.box_head.convs) == 3
    assert [layer.out_features for layer in heads.box_head.fcs if hasattr(layer, "weight")] == [32]
    assert isinstance(heads.box_head.convs[0].norm, nn.GroupNorm)
    assert heads.mask_head.predictor.out_channels == 6


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_one_head_of_two_may_be_detectron2s(kind):
    plain = {"box": "FastRCNNConvFCHead", "mask": "MaskRCNNConvUpsampleHead"}
    built = model(AH, f"MODEL.ROI_{kind.upper()}_HEAD.NAME", plain[kind])
    poolers = {k: getattr(built.roi_heads, f"{k}_pooler") for k in ("box", "mask")}
    assert isinstance(poolers.pop(kind), ROIPooler)
    assert all(isinstance(pooler, AllLevelPooler) for pooler in poolers.values())
    step(built)
    assert not idle(built)


@pytest.mark.parametrize("agnostic", [False, True])
def test_one_step_gives_every_parameter_a_gradient(agnostic):
    built = model(AH, "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", agnostic)
    found = step(built, mixed_sizes())
    assert {"loss_cls", "loss_box_reg", "loss_mask"} <= set(found)
    assert all(loss.isfinite() for loss in found.values())
    assert not idle(built)
    assert built.roi_heads.mask_head.predictor.out_channels == (1 if agnostic else 6)


def test_boxes_alone():
    built = model(AH, "MODEL.MASK_ON", False)
    assert "loss_mask" not in step(built)
    assert not idle(built)


def test_detections_have_masks_also_where_there_are_none():
    images = tiny.batch()
    built = model(AH)
    found = detections(built, images)
    assert all(len(f["instances"].pred_masks) == len(f["instances"]) > 0 for f in found)
    built.roi_heads.box_predictor.test_score_thresh = 1.0
    assert [len(f["instances"]) for f in detections(built, images)] == [0, 0]


def test_bfloat16_autocast():
    built = model(AH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = step(built)
    assert all(loss.isfinite() for loss in found.values())
    gradients = cat([p.grad.flatten() for p in built.roi_heads.parameters()])
    assert gradients.isfinite().all()


# ---- errors ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("MODEL.ROI_HEADS.NAME", "StandardROIHeads"), "MODEL.ROI_BOX_HEAD.NAME PANetBoxHead needs "
         "features pooled from all levels, which MODEL.ROI_HEADS.NAME StandardROIHeads does not "
         "give; set it to PANetROIHeads"),
        (("MODEL.ROI_BOX_HEAD.NUM_CONV", 0), "NUM_CONV must be at least 1 for PANetBoxHead, got 0"),
        (("MODEL.ROI_BOX_HEAD.NUM_FC", 0), "NUM_FC must be at least 1 for PANetBoxHead, got 0"),
        (("MODEL.ROI_MASK_HEAD.NUM_CONV", 1), "ROI_MASK_HEAD.NUM_CONV must be at least 2"),
    ],
)  # fmt: skip
def test_values_that_no_head_can_have_are_the_users_to_mend(opts, message):
    shapes = {f"p{i}": ShapeSpec(channels=32, stride=2**i) for i in range(2, 7)}
    with pytest.raises(UserError, match=message):
        build_roi_heads(config(AH, *opts), shapes)
