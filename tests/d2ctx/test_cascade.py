"""Cascade R-CNN in the papers' form: sampling at each stage, weights, averages; Detectron2's."""

from functools import partial

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
    build_roi_heads,
)
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage

from d2ctx import UserError, cascade
from d2ctx.cascade import ContextCascadeROIHeads
from d2ctx.cascade_stage import APPENDED, build_sampler, label_and_sample, mean_masks, refine
from d2ctx.config import load_config
from tests.d2ctx import tiny
from tests.d2ctx.cascade_parts import (
    CASCADE,
    HEIGHT,
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

STAGES = range(3)
LOSSES = {f"loss_{kind}_stage{s}" for kind in ("cls", "box_reg", "mask") for s in STAGES}
BOX_WEIGHTS = ((10.0, 10, 5, 5), (20.0, 20, 10, 10), (30.0, 30, 15, 15))


def model(*opts: object):
    torch.manual_seed(0)
    return build_model(config(CASCADE, *opts)).train()


def step(built, inputs) -> dict[str, torch.Tensor]:
    with EventStorage():
        found = built(inputs)
    sum(found.values()).backward()
    return found


def without_gradient(built) -> list[str]:
    return [n for n, p in built.named_parameters() if p.requires_grad and p.grad is None]


# ---- whole models ----------------------------------------------------------------------------
def test_one_step_gives_every_trainable_parameter_a_gradient():
    built = model()
    found = step(built, tiny.batch())
    assert LOSSES | {"loss_orthogonal"} <= set(found)
    assert all(loss.isfinite() for loss in found.values())
    assert not without_gradient(built)


def test_inference_gives_boxes_scores_classes_and_masks():
    with torch.no_grad():
        (output,) = model().eval()([{**tiny.batch()[0], "height": 48, "width": 64}])
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
    with torch.no_grad():
        found = built.eval()(inputs)
    assert [o["instances"].image_size for o in found] == [(83, 101), (96, 90)]


def test_bf16_autocast():
    built = model()
    with torch.autocast("cpu", torch.bfloat16), EventStorage():
        found = built(tiny.batch())
    sum(found.values()).backward()
    assert not without_gradient(built)
    assert {found[name].dtype for name in LOSSES} == {torch.float32}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert built.eval()(tiny.batch())[0]["instances"].scores.dtype == torch.float32


def test_bf16_autocast_is_near_float32():
    exact = losses(heads(CASCADE))
    with torch.autocast("cpu", torch.bfloat16):
        found = losses(heads(CASCADE))
    for name in LOSSES:
        # the same RoIs at the first stage; later ones start from boxes that differ by rounding
        near = 0.01 if name.endswith("0") else 0.1
        torch.testing.assert_close(found[name], exact[name], atol=near, rtol=near)


def test_boxes_on_half_precision_maps_are_exact():
    """Detectron2 rounds RoIs to the dtype of the maps: in bf16 that is two pixels at 500."""
    built = heads(CASCADE)
    maps = {name: x.bfloat16() for name, x in pyramid().items()}
    with torch.no_grad():
        found = built.eval()(None, maps, proposals())[0]
        expected = built(None, {name: x.float() for name, x in maps.items()}, proposals())[0]
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one.pred_boxes.tensor, two.pred_boxes.tensor)


def test_a_box_cascade_without_masks():
    built = model("MODEL.MASK_ON", False)
    found = step(built, tiny.batch())
    assert {k for k in found if "stage" in k} == {k for k in LOSSES if "mask" not in k}
    with torch.no_grad():
        assert not built.eval()(tiny.batch())[0]["instances"].has("pred_masks")
    assert not any("mask_head" in name for name in built.state_dict())


# ---- construction ----------------------------------------------------------------------------
def direct(classes: int = 3, **changes: object) -> ContextCascadeROIHeads:
    scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    pooler = partial(ROIPooler, scales=scales, sampling_ratio=2, pooler_type="ROIAlignV2")
    box_shape, mask_shape = (ShapeSpec(channels=16, height=s, width=s) for s in (7, 14))
    predictor = partial(
        FastRCNNOutputLayers,
        ShapeSpec(channels=32),
        num_classes=classes,
        cls_agnostic_bbox_reg=True,
        test_score_thresh=0.05,
        test_topk_per_image=20,
    )
    keywords = {
        "in_features": ["p2", "p3", "p4", "p5"],
        "box_pooler": pooler(output_size=7),
        "box_heads": [
            FastRCNNConvFCHead(box_shape, conv_dims=[], fc_dims=[32, 32]) for _ in STAGES
        ],
        "box_predictors": [
            predictor(box2box_transform=Box2BoxTransform(weights=w)) for w in BOX_WEIGHTS
        ],
        "samplers": [
            build_sampler(num_classes=classes, iou=iou, batch_size_per_image=16)
            for iou in (0.5, 0.6, 0.7)
        ],
        "mask_pooler": pooler(output_size=14),
        "mask_heads": [
            MaskRCNNConvUpsampleHead(mask_shape, num_classes=classes, conv_dims=[16] * 3)
            for _ in STAGES
        ],
    }
    return ContextCascadeROIHeads(**{**keywords, **changes})


def test_direct_construction_equals_the_configured():
    configured, built = heads(CASCADE), direct()
    assert {k: v.shape for k, v in built.state_dict().items()} == {
        k: v.shape for k, v in configured.state_dict().items()
    }
    built.load_state_dict(configured.state_dict())
    assert losses(built) == losses(configured)
    for one, two in zip(detections(built), detections(configured), strict=True):
        assert torch.equal(one.pred_boxes.tensor, two.pred_boxes.tensor)
        assert torch.equal(one.pred_masks, two.pred_masks)


def test_state_dict_names():
    names = {name.rpartition(".")[0] for name in heads(CASCADE).state_dict()}
    parts = ("box_head.{}.fc1", "box_head.{}.fc2", "box_predictor.{}.cls_score")
    parts += ("box_predictor.{}.bbox_pred", "mask_head.{}.mask_fcn1", "mask_head.{}.mask_fcn2")
    parts += ("mask_head.{}.deconv", "mask_head.{}.predictor")
    assert names == {part.format(stage) for part in parts for stage in STAGES}


def test_parameters_of_the_full_heads():
    cfg = load_config(str(tiny.CONFIGS / "a2fpn/cascade_mask_rcnn_r50_fpn_1x.yaml"))
    with torch.device("meta"):
        built = build_roi_heads(
            cfg, {f"p{i}": ShapeSpec(channels=256, stride=2**i) for i in range(2, 7)}
        )
    box = 256 * 7 * 7 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 * 81 + 81 + 1024 * 4 + 4
    mask = 4 * (9 * 256 * 256 + 256) + 4 * 256 * 256 + 256 + 256 * 80 + 80
    assert sum(p.numel() for p in built.parameters()) == 3 * (box + mask)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_weights": (1.0, 0.5)}, r"every stage needs one of each part.*'loss_weights': 2"),
        ({"mask_heads": ()}, r"'mask_heads': 0"),
        ({"score_mean": "max"}, r"score_mean must be one of .*got 'max'"),
        (
            {
                "box_predictors": [
                    FastRCNNOutputLayers(
                        ShapeSpec(channels=32),
                        num_classes=3,
                        box2box_transform=Box2BoxTransform(weights=w),
                    )
                    for w in BOX_WEIGHTS
                ]
            },
            r"class-agnostic \(4 outputs\), got \[12, 12, 12\]",
        ),
    ],
)
def test_parts_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        direct(**changes)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.CASCADE.LOSS_WEIGHTS", [1.0]], r"one value per cascade stage.*LOSS_WEIGHTS': 1"),
        (["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", False], "CLS_AGNOSTIC_BBOX_REG True"),
        (["MODEL.KEYPOINT_ON", True], "no keypoint head; set MODEL.KEYPOINT_ON False"),
        (["MODEL.CASCADE.SCORE_MEAN", "mean"], "SCORE_MEAN must be one of logits, probabilities"),
        (["MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p7"]], r"names \['p7'\], but the backbone gives"),
    ],
)
def test_configurations_that_describe_no_cascade(opts, message):
    with pytest.raises(UserError, match=message):
        build_roi_heads(config(CASCADE, *opts), SHAPES)


# ---- sampling --------------------------------------------------------------------------------
@pytest.mark.parametrize("iou", [0.5, 0.7])
def test_labels_are_those_of_the_stages_iou(iou):
    sampler = build_sampler(num_classes=3, iou=iou, batch_size_per_image=1000, positive_fraction=1)
    truths = targets()
    with EventStorage():
        sampled = label_and_sample(sampler, proposals(), truths)
    for found, truth in zip(sampled, truths, strict=True):
        overlap = pairwise_iou(found.proposal_boxes, truth.gt_boxes)
        best, index = overlap.max(dim=1)
        expected = torch.where(best >= iou, truth.gt_classes[index], 3)
        assert torch.equal(found.gt_classes, expected)
        assert torch.equal(found.gt_boxes.tensor, truth.gt_boxes.tensor[index])
        assert len(found) == 30 + 2  # all proposals and the ground truth
        assert torch.equal(found.get(APPENDED), overlap.max(dim=1).values == 1)


def test_a_quarter_is_positive_at_most():
    sampler = build_sampler(num_classes=3, iou=0.5, batch_size_per_image=16)
    with EventStorage():
        sampled = label_and_sample(sampler, proposals(), targets())
    assert [len(s) for s in sampled] == [16, 16]
    assert [int((s.gt_classes < 3).sum()) for s in sampled] == [4, 4]


def test_refined_boxes_are_cut_detached_and_no_ground_truth():
    sampled = Instances((HEIGHT, WIDTH), proposal_boxes=Boxes(boxes(4, seed=0)))
    sampled.set(APPENDED, torch.tensor([False, True, False, False]))
    moved = torch.tensor(
        [[-5.0, 3, 20, 90], [1, 1, 9, 9], [70, 8, 60, 30], [5, 6, 7, 8]], requires_grad=True
    )
    (found,) = refine([moved], [sampled])
    assert found.proposal_boxes.tensor.tolist() == [[0, 3, 20, HEIGHT], [5, 6, 7, 8]]
    assert not found.proposal_boxes.tensor.requires_grad
    assert found.objectness_logits.tolist() == [0, 0]


def test_every_stage_samples_anew_from_the_boxes_before_it(monkeypatch):
    seen, built = [], heads(CASCADE)

    def spy(sampler, given, truths):
        sampled = label_and_sample(sampler, given, truths)
        seen.append((sampler, given, sampled))
        return sampled

    monkeypatch.setattr(cascade, "label_and_sample", spy)
    found, truth = losses(built), targets()
    assert [s for s, _, _ in seen] == list(built.samplers)
    assert [s.proposal_matcher.thresholds[1] for s in built.samplers] == [0.5, 0.6, 0.7]
    assert set(found) == LOSSES
    for (_, _, before), (_, given, sampled) in zip(seen, seen[1:], strict=False):
        for image in range(2):
            kept = int((~before[image].get(APPENDED)).sum())
            assert 0 < len(given[image]) <= kept
            assert not torch.equal(
                given[image].proposal_boxes.tensor[:3], before[image].proposal_boxes.tensor[:3]
            )
            # ground truth comes from the sampling alone
            overlap = pairwise_iou(given[image].proposal_boxes, truth[image].gt_boxes)
            assert overlap.max() < 1
            assert int(sampled[image].get(APPENDED).sum()) > 0
            assert len(sampled[image]) <= 16


def test_stages_refine_with_their_own_weights():
    built = heads(CASCADE).eval()
    starts, maps = proposals(), pyramid()
    with torch.no_grad():
        for stage, (wx, wy, ww, wh) in enumerate(BOX_WEIGHTS):
            predictions = built._predict_boxes(maps, starts, stage)
            found = torch.cat(built.box_predictor[stage].predict_boxes(predictions, starts))
            old = torch.cat([s.proposal_boxes.tensor for s in starts]).double()
            dx, dy, dw, dh = predictions[1].double().unbind(1)
            width, height = old[:, 2] - old[:, 0], old[:, 3] - old[:, 1]
            x = (old[:, 0] + old[:, 2]) / 2 + dx / wx * width
            y = (old[:, 1] + old[:, 3]) / 2 + dy / wy * height
            width, height = width * (dw / ww).exp(), height * (dh / wh).exp()
            expected = torch.stack(
                [x - width / 2, y - height / 2, x + width / 2, y + height / 2], dim=1
            )
            assert found.shape == (60, 4)  # one box for all classes
            torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=1e-4)


# ---- losses and averages ---------------------------------------------------------------------
def test_losses_carry_the_weight_of_their_stage():
    plain = losses(heads(CASCADE, "MODEL.CASCADE.LOSS_WEIGHTS", [1.0, 1.0, 1.0]))
    weighted = losses(heads(CASCADE))
    for name, loss in plain.items():
        torch.testing.assert_close(weighted[name], loss * (1, 0.5, 0.25)[int(name[-1])])


def test_mask_losses_carry_the_weight_of_their_head():
    built = heads(CASCADE)
    plain = losses(built)
    for stage, head in enumerate(built.mask_head):
        head.loss_weight = 2.0 + stage
    weighted = losses(built)
    for stage in STAGES:
        name = f"loss_mask_stage{stage}"
        torch.testing.assert_close(weighted[name], plain[name] * (2 + stage))


def test_without_sampling_all_losses_are_those_of_detectron2():
    everything = [
        "MODEL.CASCADE.LOSS_WEIGHTS", [1.0, 1.0, 1.0],
        "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 1000,
        "MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0,
    ]  # fmt: skip
    ours, theirs = heads(CASCADE, *everything), detectron2s(*everything)
    copy_weights(ours, theirs)
    found, expected = losses(ours), losses(theirs)
    torch.testing.assert_close(found["loss_mask_stage0"], expected.pop("loss_mask"))
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss)


def test_detections_on_mean_probabilities_are_those_of_detectron2():
    ours, theirs = heads(CASCADE, "MODEL.CASCADE.SCORE_MEAN", "probabilities"), detectron2s()
    copy_weights(ours, theirs)
    for found, expected in zip(detections(ours), detections(theirs), strict=True):
        assert len(found) > 3
        torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)
        torch.testing.assert_close(found.scores, expected.scores)
        assert torch.equal(found.pred_classes, expected.pred_classes)


def detectron2s(*opts: object):
    """Detectron2's own cascade, which stays selectable."""
    cfg = config(CASCADE, "MODEL.ROI_HEADS.NAME", "CascadeROIHeads", *opts)
    return build_roi_heads(cfg, SHAPES)


def copy_weights(ours, theirs) -> None:
    theirs.box_head.load_state_dict(ours.box_head.state_dict())
    theirs.box_predictor.load_state_dict(ours.box_predictor.state_dict())
    theirs.mask_head.load_state_dict(ours.mask_head[0].state_dict())


@pytest.mark.parametrize("mean", ["logits", "probabilities"])
def test_scores_are_the_mean_over_the_stages(mean):
    built = heads(CASCADE, "MODEL.CASCADE.SCORE_MEAN", mean)
    starts = proposals()
    logits = [torch.randn(60, 4) for _ in STAGES]
    scores = torch.cat(built._mean_scores([((x, torch.zeros(60, 4)), starts) for x in logits]))
    if mean == "logits":
        expected = (sum(logits) / 3).softmax(dim=1)
    else:
        expected = sum(x.softmax(dim=1) for x in logits) / 3
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("channels", [4, 1])
def test_masks_are_the_mean_of_the_probabilities_of_their_class(channels):
    logits = [torch.randn(5, channels, 6, 6) for _ in STAGES]
    classes = torch.tensor([0, 3, 1, 1, 2])
    found = mean_masks(logits, classes)
    assert found.shape == (5, 1, 6, 6)
    for row, k in enumerate(classes.tolist()):
        k = k if channels > 1 else 0
        expected = sum(1 / (1 + (-x[row, k]).exp()) for x in logits) / 3
        torch.testing.assert_close(found[row, 0], expected)


def test_predicted_masks_average_all_three_heads():
    built = heads(CASCADE)
    found = detections(built)
    with torch.no_grad():
        pooled = built._mask_features(pyramid(), [f.pred_boxes for f in found])
        probabilities = [head.layers(pooled).sigmoid() for head in built.mask_head]
    classes = torch.cat([f.pred_classes for f in found])
    mean = sum(probabilities) / 3
    expected = mean[torch.arange(len(classes)), classes][:, None]
    torch.testing.assert_close(torch.cat([f.pred_masks for f in found]), expected)


def test_given_boxes_get_the_same_masks():
    built = heads(CASCADE)
    found = detections(built)
    bare = [
        Instances(f.image_size, pred_boxes=f.pred_boxes, pred_classes=f.pred_classes) for f in found
    ]
    with torch.no_grad():
        again = built.forward_with_given_boxes(pyramid(), bare)
    for one, two in zip(found, again, strict=True):
        assert torch.equal(one.pred_masks, two.pred_masks)


def test_an_image_is_detected_as_it_would_be_alone():
    built = heads(CASCADE)
    both, alone = detections(built, 2)[0], None
    maps = {name: x[:1] for name, x in pyramid().items()}
    with torch.no_grad():
        (alone,), _ = built.eval()(None, maps, proposals()[:1])
    torch.testing.assert_close(both.pred_boxes.tensor, alone.pred_boxes.tensor)
    torch.testing.assert_close(both.pred_masks, alone.pred_masks, atol=1e-5, rtol=1e-5)


def test_nothing_detected():
    built = heads(CASCADE, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.0)
    assert [len(f) for f in detections(built)] == [0, 0]
    assert all(f.pred_masks.shape == (0, 1, 28, 28) for f in detections(built))
