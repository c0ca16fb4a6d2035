"""Hybrid Task Cascade: interleaved stages, mask information flow, and the semantic branch."""

import logging
from functools import partial

import pytest
import torch
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import build_roi_heads
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torchvision.ops import roi_align

from d2ctx import UserError, cascade, htc
from d2ctx.cascade_stage import label_and_sample
from d2ctx.config import load_config
from d2ctx.htc import HybridTaskROIHeads
from d2ctx.htc_config import htc_keywords
from d2ctx.semantic_branch import SemanticBranch
from tests.d2ctx import tiny
from tests.d2ctx.cascade_parts import (
    CHANNELS,
    HEIGHT,
    HTC,
    SEMANTIC_OFF,
    SHAPES,
    WIDTH,
    boxes,
    config,
    detections,
    heads,
    losses,
    proposals,
    pyramid,
    targets,
)
from tests.d2ctx.toy_coco import restored_catalogs
from tests.oracles import htc as oracle

STAGES = range(3)
LOSSES = {f"loss_{kind}_stage{s}" for kind in ("cls", "box_reg", "mask") for s in STAGES}
FPN = ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.FPN.OUT_CHANNELS", 16)


def model(*opts: object):
    torch.manual_seed(0)
    return build_model(config(HTC, *opts)).train()


def step(built, inputs) -> dict[str, torch.Tensor]:
    with EventStorage():
        found = built(inputs)
    sum(found.values()).backward()
    return found


def without_gradient(built) -> list[str]:
    return [n for n, p in built.named_parameters() if p.requires_grad and p.grad is None]


def labels(num_images: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    found = torch.randint(0, 13, (num_images, HEIGHT, WIDTH), generator=generator)
    found[:, :20] = 255
    return found


# ---- whole models ----------------------------------------------------------------------------
@pytest.mark.parametrize("backbone", [(), FPN], ids=["a2fpn", "fpn"])
def test_one_step_gives_every_trainable_parameter_a_gradient(backbone):
    built = model(*backbone)
    found = step(built, tiny.batch())
    expected = LOSSES | {"loss_semantic", "loss_rpn_cls", "loss_rpn_loc"}
    assert set(found) == expected | (set() if backbone else {"loss_orthogonal"})
    assert all(loss.isfinite() for loss in found.values())
    assert not without_gradient(built)


@pytest.mark.parametrize("architecture", ["ContextHTC", "ContextRCNN"])
def test_without_the_semantic_branch_nothing_semantic_is_left(architecture):
    built = model(*SEMANTIC_OFF, "MODEL.META_ARCHITECTURE", architecture)
    inputs = [{k: v for k, v in x.items() if k != "sem_seg"} for x in tiny.batch()]
    found = step(built, inputs)
    assert {k for k in found if "rpn" not in k} == LOSSES | {"loss_orthogonal"}
    assert not without_gradient(built)
    assert not [name for name in built.state_dict() if "semantic" in name]
    with torch.no_grad():
        assert built.eval()(inputs)[0]["instances"].has("pred_masks")


def test_that_it_is_off_is_said_once(caplog):
    from detectron2.utils import logger

    logger._LOG_COUNTER.clear()
    with caplog.at_level(logging.INFO, logger="d2ctx"):
        model(*SEMANTIC_OFF)
        model(*SEMANTIC_OFF)
    said = [r.message for r in caplog.records if "semantic" in r.message]
    assert said == [
        "Hybrid Task Cascade without its semantic branch (MODEL.HTC.SEMANTIC.ENABLED False): no "
        "stuff-thing maps are read"
    ]


def test_inference_needs_no_maps():
    inputs = [{"image": x["image"], "height": 48, "width": 64} for x in tiny.batch()]
    with torch.no_grad():
        output, _ = model().eval()(inputs)
    found = output["instances"]
    assert set(found.get_fields()) == {"pred_boxes", "scores", "pred_classes", "pred_masks"}
    assert len(found) > 0
    assert found.pred_masks.shape == (len(found), 48, 64)


@pytest.mark.parametrize("empty", [(0,), (0, 1)])
def test_images_without_objects(empty):
    built, inputs = model(), tiny.batch()
    for image in empty:
        inputs[image]["instances"] = inputs[image]["instances"][:0]
    found = step(built, inputs)
    assert all(loss.isfinite() for loss in found.values())
    assert not without_gradient(built)
    if len(empty) == 2:
        assert not any(found[f"loss_mask_stage{s}"] for s in STAGES)


def test_images_of_different_odd_sizes():
    built = model()
    inputs = tiny.batch(height=83, width=101, num_images=1) + tiny.batch(
        height=96, width=90, num_images=1
    )
    assert all(loss.isfinite() for loss in step(built, inputs).values())
    padded = built._semantic_targets(inputs)
    assert padded.shape == (2, 128, 128)  # a multiple of 64, as the images
    assert torch.equal(padded[0, :83, :101], inputs[0]["sem_seg"])
    assert (padded[0, 83:] == 255).all()
    assert (padded[1, :, 90:] == 255).all()
    with torch.no_grad():
        found = built.eval()(inputs)
    assert [o["instances"].image_size for o in found] == [(83, 101), (96, 90)]


def test_bf16_autocast():
    built = model()
    with torch.autocast("cpu", torch.bfloat16), EventStorage():
        found = built(tiny.batch())
    sum(found.values()).backward()
    assert not without_gradient(built)
    assert {loss.dtype for loss in found.values()} == {torch.float32}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert built.eval()(tiny.batch())[0]["instances"].scores.dtype == torch.float32


def test_training_pictures_are_still_made():
    built = model("VIS_PERIOD", 1)
    built.roi_heads.mask_head.apply(lambda m: setattr(m, "vis_period", 0))
    built.proposal_generator.vis_period = 0
    with EventStorage() as storage:
        built(tiny.batch())
        assert [name for name, *_ in storage._vis_data] == [
            "Left: GT bounding boxes;  Right: Predicted proposals"
        ]


# ---- errors ----------------------------------------------------------------------------------
def test_maps_missing_in_the_data():
    inputs = tiny.batch()
    del inputs[1]["sem_seg"]
    with pytest.raises(UserError, match=r"the data have none.*SEM_SEG, or set .*ENABLED False"):
        step(model(), inputs)
    with pytest.raises(UserError, match="the data have none"):
        losses(heads(HTC))


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (
            ["MODEL.META_ARCHITECTURE", "ContextRCNN"],
            r"ContextRCNN does not hand stuff-thing maps.*set it to ContextHTC, or set MODEL\.HTC",
        ),
        (
            ["MODEL.ROI_HEADS.NAME", "ContextCascadeROIHeads"],
            r"ContextHTC drives HybridTaskROIHeads, got .*ContextCascadeROIHeads; set it",
        ),
        (["MODEL.MASK_ON", False], "HybridTaskROIHeads needs masks; set MODEL.MASK_ON True"),
        (
            ["MODEL.HTC.SEMANTIC.IN_FEATURES", ["p3", "p7"]],
            r"MODEL\.HTC\.SEMANTIC: .*\['p7'\] are not among the backbone's \['p2', 'p3'",
        ),
        (["MODEL.HTC.SEMANTIC.COMMON_FEATURE", "p7"], r"COMMON_FEATURE must be a map.*'p7'"),
        (
            ["MODEL.HTC.SEMANTIC.IN_FEATURES", ["p2", "p4"]],
            r"the common map must be one of \['p2', 'p4'\], got 'p3'",
        ),
    ],
)
def test_configurations_that_do_not_fit(opts, message):
    with pytest.raises(UserError, match=message):
        model(*opts)


def test_a_mask_head_without_deconvolution_is_refused(monkeypatch):
    from d2ctx import cascade_config

    monkeypatch.setattr(cascade_config, "build_mask_head", lambda cfg, shape: nn.Identity())
    with pytest.raises(UserError, match=r"has none, set .* MaskRCNNConvUpsampleHead"):
        heads(HTC)


def test_as_many_flows_as_gaps_between_heads():
    keywords = htc_keywords(config(HTC), SHAPES)
    keywords["mask_flow"].pop()
    with pytest.raises(ValueError, match=r"3 mask heads have 2 modules between them, got 1"):
        HybridTaskROIHeads(**keywords)


# ---- construction ----------------------------------------------------------------------------
def test_direct_construction_equals_the_configured():
    configured = heads(HTC)
    plain = htc_keywords(config(HTC, *SEMANTIC_OFF), SHAPES)
    del plain["semantic"], plain["mask_flow"]
    built = HybridTaskROIHeads(
        **plain,
        mask_flow=[Conv2d(16, CHANNELS, kernel_size=1, activation=nn.ReLU()) for _ in range(2)],
        semantic=branch(width=16),
    )
    assert {k: v.shape for k, v in built.state_dict().items()} == {
        k: v.shape for k, v in configured.state_dict().items()
    }
    built.load_state_dict(configured.state_dict())
    assert losses(built, labels()) == losses(configured, labels())
    for one, two in zip(detections(built), detections(configured), strict=True):
        assert torch.equal(one.pred_masks, two.pred_masks)


def branch(width: int = 8, classes: int = 13, **changes: object) -> SemanticBranch:
    keywords = {
        "input_shape": SHAPES,
        "in_features": list(SHAPES),
        "num_classes": classes,
        "embed_dim": CHANNELS,
        "width": width,
        "pooler": ROIPooler(
            output_size=14, scales=[1 / 8], sampling_ratio=2, pooler_type="ROIAlignV2"
        ),
    }
    return SemanticBranch(**{**keywords, **changes})


def test_state_dict_names_beyond_the_cascade():
    names = {name.rpartition(".")[0] for name in heads(HTC).state_dict()}
    own = {n for n in names if not n.startswith(("box_", "mask_head"))}
    semantic = {f"lateral.p{i}" for i in range(2, 7)} | {f"convs.{i}" for i in range(4)}
    semantic |= {"predictor", "embedding"}
    assert own == {f"semantic.{n}" for n in semantic} | {"mask_flow.0", "mask_flow.1"}


def test_parameters_of_the_full_heads():
    with restored_catalogs():
        cfg = load_config(str(tiny.CONFIGS / "a2fpn/htc_r50_a2fpn_20e.yaml"))
    shapes = {f"p{i}": ShapeSpec(channels=256, stride=2**i) for i in range(2, 7)}
    with torch.device("meta"):
        built = build_roi_heads(cfg, shapes)
    box = 256 * 7 * 7 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 * 81 + 81 + 1024 * 4 + 4
    mask = 4 * (9 * 256 * 256 + 256) + 4 * 256 * 256 + 256 + 256 * 80 + 80
    one = 256 * 256 + 256
    semantic = 5 * one + 4 * (9 * 256 * 256 + 256) + 256 * 183 + 183 + one
    assert sum(p.numel() for p in built.semantic.parameters()) == semantic == 2_802_103
    assert sum(p.numel() for p in built.parameters()) == 3 * (box + mask) + 2 * one + semantic


# ---- interleaved execution -------------------------------------------------------------------
def test_masks_are_trained_on_boxes_refined_and_sampled_anew(monkeypatch):
    seen, trained, built = [], [], heads(HTC)

    def spy(kind, sampler, given, truths):
        sampled = label_and_sample(sampler, given, truths)
        seen.append((kind, sampler, given, sampled))
        return sampled

    mask_loss = built._mask_loss
    monkeypatch.setattr(cascade, "label_and_sample", partial(spy, "box"))
    monkeypatch.setattr(htc, "label_and_sample", partial(spy, "mask"))
    monkeypatch.setattr(
        built, "_mask_loss", lambda f, rois, s: trained.append(rois) or mask_loss(f, rois, s)
    )
    losses(built, labels())
    assert [kind for kind, *_ in seen] == ["box", "mask"] * 3
    assert [s for _, s, *_ in seen] == [s for s in built.samplers for _ in range(2)]
    for stage in STAGES:
        (_, _, _, sampled), (_, _, refined, rois) = seen[2 * stage : 2 * stage + 2]
        assert trained[stage] is rois
        assert all(len(r) <= len(s) for r, s in zip(refined, sampled, strict=True))
        assert not torch.equal(
            refined[0].proposal_boxes.tensor[:3], sampled[0].proposal_boxes.tensor[:3]
        )
        if stage < 2:  # the next stage starts from the same refined boxes
            assert seen[2 * stage + 2][2] is refined


def test_losses_carry_the_weight_of_their_stage():
    plain = losses(heads(HTC, "MODEL.CASCADE.LOSS_WEIGHTS", [1.0, 1.0, 1.0]), labels())
    weighted = losses(heads(HTC), labels())
    torch.testing.assert_close(weighted.pop("loss_semantic"), plain.pop("loss_semantic"))
    for name, loss in plain.items():
        torch.testing.assert_close(weighted[name], loss * (1, 0.5, 0.25)[int(name[-1])])


# ---- mask information flow -------------------------------------------------------------------
@pytest.mark.parametrize("stages", [[0], [1], [2], [0, 1, 2], [0, 2]])
def test_mask_logits_equal_the_recursive_definition(stages):
    built = heads(HTC).double()
    pooled = torch.randn(3, CHANNELS, 5, 5, dtype=torch.float64)
    found = built._mask_logits(pooled, stages)
    assert len(found) == len(stages)
    for stage, logits in zip(stages, found, strict=True):
        expected = oracle.mask_logits(built.state_dict(), pooled, stage, num_convs=2)
        torch.testing.assert_close(logits, expected, atol=1e-10, rtol=1e-10)


def test_gradients_flow_through_earlier_heads_but_not_their_outputs():
    built = heads(HTC)
    losses(built, labels())["loss_mask_stage2"].backward()
    got = {n for n, p in built.named_parameters() if p.grad is not None and p.grad.any()}
    for stage in (0, 1):
        assert f"mask_head.{stage}.mask_fcn1.weight" in got
        assert f"mask_flow.{stage}.weight" in got
        assert f"mask_head.{stage}.predictor.weight" not in got
        assert f"mask_head.{stage}.deconv.weight" not in got


def test_predicted_masks_average_all_three_heads():
    built = heads(HTC)
    found = detections(built)
    maps = {**pyramid(), htc.EMBEDDING: built.semantic(pyramid())[1]}
    with torch.no_grad():
        pooled = built._mask_features(maps, [f.pred_boxes for f in found])
        state = built.state_dict()
        probabilities = [
            oracle.mask_logits(state, pooled, s, num_convs=2).sigmoid() for s in STAGES
        ]
    classes = torch.cat([f.pred_classes for f in found])
    expected = (sum(probabilities) / 3)[torch.arange(len(classes)), classes][:, None]
    assert len(classes) > 5
    torch.testing.assert_close(
        torch.cat([f.pred_masks for f in found]), expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("off", [(), SEMANTIC_OFF], ids=["semantic", "plain"])
def test_given_boxes_get_the_same_masks(off):
    built = heads(HTC, *off)
    found = detections(built)
    bare = [
        Instances(f.image_size, pred_boxes=f.pred_boxes, pred_classes=f.pred_classes) for f in found
    ]
    with torch.no_grad():
        again = built.forward_with_given_boxes(pyramid(), bare)
    for one, two in zip(found, again, strict=True):
        assert torch.equal(one.pred_masks, two.pred_masks)


def test_nothing_detected():
    built = heads(HTC, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.0)
    assert all(f.pred_masks.shape == (0, 1, 28, 28) for f in detections(built))


# ---- semantic branch -------------------------------------------------------------------------
def small_maps(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Odd, non-square maps down to a single pixel."""
    generator = torch.Generator().manual_seed(3)
    sizes = {"p2": (10, 6), "p3": (5, 3), "p4": (3, 2), "p5": (2, 1), "p6": (1, 1)}
    return {
        name: torch.randn(2, CHANNELS, *size, generator=generator, dtype=dtype)
        for name, size in sizes.items()
    }


def test_branch_equals_its_definition():
    torch.manual_seed(0)
    built, maps = branch().double(), small_maps()
    with torch.no_grad():  # a bias that the ReLU sees
        built.lateral["p4"].bias.normal_()
    logits, embedding = built(maps)
    expected = oracle.semantic_branch(built.state_dict(), maps, common="p3", num_convs=4)
    torch.testing.assert_close(logits, expected[0], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(embedding, expected[1], atol=1e-10, rtol=1e-10)
    assert logits.shape == (2, 13, 5, 3)
    assert embedding.shape == (2, CHANNELS, 5, 3)


def test_branch_gradients():
    built = branch(width=3, classes=4, num_convs=1, in_features=["p3", "p6"]).double()
    maps = small_maps()

    def run(x, y):
        return built({"p3": x, "p6": y})

    inputs = [maps[name][:1, :, :3, :2].clone().requires_grad_() for name in ("p3", "p6")]
    assert torch.autograd.gradcheck(run, inputs)


def test_semantic_loss_equals_its_definition():
    logits = torch.randn(2, 5, 4, 3, dtype=torch.float64, requires_grad=True)
    truth = torch.randint(0, 5, (2, 32, 24))
    truth[0, :9] = 255
    found = branch(classes=5).loss(logits, truth)
    expected = 0.2 * oracle.semantic_loss(logits, truth, stride=8, ignore=255)
    torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(lambda z: branch(classes=5).loss(z, truth), [logits])


def test_an_image_of_which_nothing_is_known_gives_no_loss():
    logits = torch.randn(1, 13, 4, 3, requires_grad=True)
    loss = branch().loss(logits, torch.full((1, 32, 24), 255))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


@pytest.mark.parametrize(("size", "mean"), [(14, 1), (7, 2)])
def test_pooling_is_roi_align_at_one_eighth_then_the_mean(size, mean):
    embedding = torch.randn(2, CHANNELS, HEIGHT // 8, WIDTH // 8)
    lists = [boxes(3, seed=0), boxes(2, seed=1)]
    found = branch().pool(embedding, [Boxes(b) for b in lists], (size, size))
    expected = roi_align(embedding, lists, 14, spatial_scale=1 / 8, sampling_ratio=2, aligned=True)
    expected = expected.reshape(5, CHANNELS, size, mean, size, mean).mean(dim=(3, 5))
    torch.testing.assert_close(found, expected)


def test_embedding_is_added_to_box_and_mask_features_of_every_stage(monkeypatch):
    built, pooled = heads(HTC), []
    pool = built.semantic.pool

    def spy(embedding, given, size):
        pooled.append((tuple(size), sum(len(b) for b in given)))
        return pool(embedding, given, size)

    monkeypatch.setattr(built.semantic, "pool", spy)
    losses(built, labels())
    assert [size for size, _ in pooled] == [(7, 7), (14, 14)] * 3
    pooled.clear()
    found = detections(built)
    assert pooled == [((7, 7), 60)] * 3 + [((14, 14), sum(len(f) for f in found))]

    maps, lists = pyramid(), [p.proposal_boxes for p in proposals()]
    embedding = torch.randn(2, CHANNELS, HEIGHT // 8, WIDTH // 8)
    both = {**maps, htc.EMBEDDING: embedding}
    none = {**maps, htc.EMBEDDING: torch.zeros_like(embedding)}
    for features, side in ((built._box_features, 7), (built._mask_features, 14)):
        gain = features(both, lists) - features(none, lists)
        torch.testing.assert_close(gain, pool(embedding, lists, (side, side)), atol=1e-5, rtol=1e-5)


def test_detection_losses_reach_the_semantic_branch():
    built = heads(HTC)
    found = losses(built, labels())
    sum(loss for name, loss in found.items() if name != "loss_semantic").backward()
    assert built.semantic.embedding.weight.grad.any()
    assert built.semantic.lateral["p6"].weight.grad.any()
    assert built.semantic.predictor.weight.grad is None


def test_targets_are_not_needed_in_inference_and_change_no_other_loss():
    built = heads(HTC)
    one, two = losses(built, labels()), losses(built, torch.zeros_like(labels()))
    assert one.pop("loss_semantic") != two.pop("loss_semantic")
    assert one == two
    assert len(targets()) == len(detections(built))
