"""Cascade, HTC, ResNeXt and longer schedules: each file changes what its name says."""

from pathlib import Path

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_resnet_backbone

from tests.contracts.test_configs import (
    COCO_IMAGES,
    CONFIGS,
    NECK_PARAMETERS,
    differences,
    load,
)
from tests.d2ctx.toy_coco import restored_catalogs

BACKBONES = ("r50", "r101", "x101_64x4d")
ROWS = [(backbone, neck) for backbone in BACKBONES for neck in NECK_PARAMETERS]
MULTI_SCALE = {"mask_rcnn_r50_a2fpn_ms_2x", "htc_x101_64x4d_a2fpn_ms_2x"}
EPOCHS = {"1x": (12, 8, 11), "20e": (20, 16, 19), "2x": (24, 16, 22)}
STUFF_THING = "DATASETS.COCO_FORMAT.coco_2017_train_stuffthing"


@pytest.fixture(autouse=True, scope="module")
def _catalogs():
    with restored_catalogs():
        yield


def of(system: str, backbone: str, neck: str, schedule: str) -> str:
    return f"a2fpn/{system}_{backbone}_{neck}_{schedule}.yaml"


def found_rows() -> list[str]:
    names = sorted(path.stem for path in (CONFIGS / "a2fpn").glob("*.yaml"))
    return [name for name in names if not name.endswith("_instant")]


def test_every_row_has_its_file():
    rows = {
        f"{system}_{backbone}_{neck}_{schedule}"
        for system, schedule in (("mask_rcnn", "1x"), ("cascade_mask_rcnn", "1x"), ("htc", "20e"))
        for backbone, neck in ROWS
    }
    assert set(found_rows()) == rows | MULTI_SCALE


@pytest.mark.parametrize(("backbone", "neck"), ROWS)
def test_cascade_changes_only_the_heads(backbone, neck):
    cascade, plain = (of(s, backbone, neck, "1x") for s in ("cascade_mask_rcnn", "mask_rcnn"))
    assert differences(cascade, plain) == {
        "MODEL.ROI_HEADS.NAME": "ContextCascadeROIHeads",
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
    }


def test_cascade_says_the_papers_settings():
    model = load(of("cascade_mask_rcnn", "r50", "a2fpn", "1x")).MODEL
    assert model.ROI_BOX_CASCADE_HEAD.IOUS == (0.5, 0.6, 0.7)
    weights = [tuple(w) for w in model.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS]
    # the inverse of mmdetection's target deviations 0.1, 0.05, 0.033
    assert weights == [(10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)]
    assert model.CASCADE.LOSS_WEIGHTS == [1.0, 0.5, 0.25]
    assert (model.ROI_HEADS.BATCH_SIZE_PER_IMAGE, model.ROI_HEADS.POSITIVE_FRACTION) == (512, 0.25)
    assert model.ROI_HEADS.PROPOSAL_APPEND_GT


@pytest.mark.parametrize(("backbone", "neck"), ROWS)
def test_htc_changes_heads_data_and_epochs(backbone, neck):
    htc, cascade = of("htc", backbone, neck, "20e"), of("cascade_mask_rcnn", backbone, neck, "1x")
    changed = differences(htc, cascade)
    assert changed == {
        "MODEL.META_ARCHITECTURE": "ContextHTC",
        "MODEL.ROI_HEADS.NAME": "HybridTaskROIHeads",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.001,
        f"{STUFF_THING}.JSON": "coco/annotations/instances_train2017.json",
        f"{STUFF_THING}.IMAGES": "coco/train2017",
        f"{STUFF_THING}.SEM_SEG": "coco/stuffthingmaps/train2017",
        "DATASETS.TRAIN": ("coco_2017_train_stuffthing",),
        "SOLVER.MAX_ITER": 293165,
        "SOLVER.STEPS": (234532, 278507),
    }


def test_htc_says_the_papers_settings():
    cfg = load(of("htc", "r50", "a2fpn", "20e"))
    semantic = cfg.MODEL.HTC.SEMANTIC
    assert semantic.ENABLED
    assert semantic.IN_FEATURES == ["p2", "p3", "p4", "p5", "p6"]
    assert (semantic.COMMON_FEATURE, semantic.NUM_CLASSES, semantic.IGNORE_VALUE) == (
        "p3",
        183,
        255,
    )
    assert (semantic.NUM_CONV, semantic.CONV_DIM, semantic.LOSS_WEIGHT) == (4, 256, 0.2)
    assert semantic.POOLER_RESOLUTION == 14
    assert cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST == 0.5
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 100


@pytest.mark.parametrize("neck", NECK_PARAMETERS)
def test_resnext_101_changes_nothing_but_the_bottom_up_network(neck):
    resnext, resnet = (of("mask_rcnn", b, neck, "1x") for b in ("x101_64x4d", "r50"))
    assert differences(resnext, resnet) == {
        "MODEL.RESNETS.DEPTH": 101,
        "MODEL.RESNETS.NUM_GROUPS": 64,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
        "MODEL.WEIGHTS": "weights/resnext101_64x4d.safetensors",
    }


def test_resnext_101_is_64x4d():
    cfg = load(of("mask_rcnn", "x101_64x4d", "a2fpn", "1x"))
    with torch.device("meta"):
        resnext = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    assert sum(p.numel() for p in resnext.parameters()) == resnext_parameters()
    for number, width in enumerate((256, 512, 1024, 2048), start=2):
        first, *_ = stage = getattr(resnext, f"res{number}")
        assert {block.conv2.groups for block in stage} == {64}
        assert {block.conv2.in_channels for block in stage} == {width}
        # the stride is in the grouped 3x3
        assert (first.conv1.stride, first.conv2.stride[0]) == ((1, 1), 1 if number == 2 else 2)


def resnext_parameters() -> int:
    """Convolutions of ResNeXt-101 64x4d: stem, then bottlenecks of 4 * 64 * 2^i channels.

    Frozen batch norm has buffers and no parameters.
    """
    total, into = 3 * 64 * 49, 64
    for i, blocks in enumerate((3, 4, 23, 3)):
        inner, out = 256 * 2**i, 256 * 2**i
        total += into * out  # shortcut
        for _ in range(blocks):
            total += into * inner + inner * (inner // 64) * 9 + inner * out
            into = out
    return total


@pytest.mark.parametrize("neck", NECK_PARAMETERS)
def test_neck_on_resnext_has_the_papers_parameters(neck):
    with torch.device("meta"):
        backbone = build_backbone(load(of("mask_rcnn", "x101_64x4d", neck, "1x")))
    counts = [sum(p.numel() for p in part.parameters()) for part in (backbone, backbone.bottom_up)]
    assert counts[0] - counts[1] == NECK_PARAMETERS[neck]


@pytest.mark.parametrize(
    ("name", "plain", "sizes"),
    [
        (
            "mask_rcnn_r50_a2fpn_ms_2x",
            "mask_rcnn_r50_a2fpn_1x",
            {"INPUT.MIN_SIZE_TRAIN": (640, 800)},
        ),
        (
            "htc_x101_64x4d_a2fpn_ms_2x",
            "htc_x101_64x4d_a2fpn_20e",
            {"INPUT.MIN_SIZE_TRAIN": (400, 1400), "INPUT.MAX_SIZE_TRAIN": 1600},
        ),
    ],
)
def test_multi_scale_rows_change_sizes_and_epochs(name, plain, sizes):
    assert differences(f"a2fpn/{name}.yaml", f"a2fpn/{plain}.yaml") == {
        **sizes,
        "INPUT.MIN_SIZE_TRAIN_SAMPLING": "range",
        "SOLVER.MAX_ITER": 351798,
        "SOLVER.STEPS": (234532, 322482),
    }


@pytest.mark.parametrize(
    "name",
    sorted(path.name for path in (CONFIGS / "a2fpn").glob("*.yaml") if "_instant" not in path.stem),
)
def test_epochs_are_those_of_the_name(name):
    solver = load(f"a2fpn/{name}").SOLVER
    epochs, *drops = EPOCHS[Path(name).stem.rpartition("_")[2]]
    per_epoch = COCO_IMAGES / solver.IMS_PER_BATCH
    assert (solver.MAX_ITER, solver.STEPS) == (
        round(epochs * per_epoch),
        tuple(round(drop * per_epoch) for drop in drops),
    )
