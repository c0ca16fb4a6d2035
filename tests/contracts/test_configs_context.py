"""FPT, Squeeze Reasoning and Panoptic FPN: each file changes what its name says."""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_backbone

from tests.contracts.test_configs import NECK_PARAMETERS, RUNS, differences, load
from tests.d2ctx.toy_coco import restored_catalogs

R101 = {
    "MODEL.RESNETS.DEPTH": 101,
    "MODEL.WEIGHTS": "detectron2://ImageNetPretrained/torchvision/R-101.pkl",
}
X101 = {
    "MODEL.RESNETS.DEPTH": 101,
    "MODEL.WEIGHTS": "weights/resnext101_32x4d.safetensors",
    "MODEL.RESNETS.NUM_GROUPS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
}
BACKBONES = {"r50": {}, "r101": R101, "x101_32x4d": X101}
# Context in the ResNet; what equals the default is not among the differences.
SR = {"MODEL.CONTEXT_BLOCK.KIND": "sr"}
NL_RES5 = {
    "MODEL.CONTEXT_BLOCK.KIND": "nl",
    "MODEL.CONTEXT_BLOCK.STAGES": ["res5"],
    "MODEL.CONTEXT_BLOCK.REDUCTION": 2,
}
CONTEXT = {
    "nl": {**NL_RES5, "MODEL.CONTEXT_BLOCK.STAGES": ["res4"],
           "MODEL.CONTEXT_BLOCK.BLOCKS": "before_last"},
    "gc": {"MODEL.CONTEXT_BLOCK.KIND": "gc"},
    "aa": {"MODEL.CONTEXT_BLOCK.KIND": "aa", "MODEL.CONTEXT_BLOCK.STAGES": ["res4", "res5"]},
}  # fmt: skip
CASCADE = {
    "MODEL.ROI_HEADS.NAME": "ContextCascadeROIHeads",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
}
AUGMENTED_HEAD = {
    "MODEL.ROI_HEADS.NAME": "PANetROIHeads",
    "MODEL.ROI_BOX_HEAD.NAME": "PANetBoxHead",
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 4,
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_BOX_HEAD.NORM": "GN",
    "MODEL.ROI_MASK_HEAD.NAME": "PANetMaskHead",
    "MODEL.ROI_MASK_HEAD.NORM": "GN",
}
MULTI_SCALE = {
    "INPUT.MIN_SIZE_TRAIN": (400, 600, 800, 1000, 1200, 1200),
    "INPUT.MAX_SIZE_TRAIN": 1400,
    "INPUT.MIN_SIZE_TEST": 1000,
    "INPUT.MAX_SIZE_TEST": 1400,
}
PANOPTIC = {
    "MODEL.META_ARCHITECTURE": "ContextPanopticFPN",
    "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": 0.5,
    "DATASETS.TRAIN": ("coco_2017_train_panoptic_separated",),
    "DATASETS.TEST": ("coco_2017_val_panoptic_separated",),
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": False,
}
BOXES = {"MODEL.MASK_ON": False}
FPT = {"MODEL.BACKBONE.NAME": "build_resnet_fpt_backbone"}
FPN = {"MODEL.BACKBONE.NAME": "build_context_resnet_fpn_backbone"}
A2FPN = {"MODEL.BACKBONE.NAME": "build_resnet_a2fpn_backbone"}
A2FPN_LITE = A2FPN | {
    "MODEL.A2FPN.CONTEXT_CHANNELS": 128,
    "MODEL.A2FPN.NUM_CONTEXTS": [128, 96, 64, 32],
    "MODEL.A2FPN.EXTRA_LEVEL": "maxpool",
    "MODEL.A2FPN.OUT_CONV_P2": False,
}
BPA = A2FPN | {
    "MODEL.A2FPN.LATERAL": "conv",
    "MODEL.A2FPN.TOP_DOWN": "nearest",
    "MODEL.A2FPN.BOTTOM_UP": "conv",
    "MODEL.A2FPN.EXTRA_LEVEL": "maxpool",
    "MODEL.A2FPN.OUT_CONV_P2": False,
}


def kinds(*names: str) -> dict[str, object]:
    return {"MODEL.FPT.TRANSFORMERS": list(names)}


def norm(name: str, *, drop: bool) -> dict[str, object]:
    found = {} if drop else {"MODEL.FPT.DROPBLOCK_PROB": 0.0}
    return found if name == "SyncBN" else {**found, "MODEL.FPT.NORM": name}


PLAIN, ONE, TWO, THREE = (
    "fpt/mask_rcnn_r50_fpt_1x", "fpt/table1/st_gt_rt", "fpt/table2", "fpt/table3",
)  # fmt: skip
# File -> (file that it is compared with, what differs).
ROWS: dict[str, tuple[str, dict[str, object]]] = {
    "fpt/mask_rcnn_r50_bfp_1x": (PLAIN, kinds()),
    "fpt/mask_rcnn_r50_fpn_fpt_1x": (PLAIN, {"MODEL.FPT.BASE": "fpn"}),
    "fpt/mask_rcnn_r50_fpt_small_1x": (
        PLAIN, {"MODEL.FPT.PAIRS": "adjacent", "MODEL.FPT.KV_POOL": [2, 2, 1, 1]}),
    "fpt/mask_rcnn_r50_fpt_ah_1x": (PLAIN, AUGMENTED_HEAD),
    "fpt/mask_rcnn_r101_fpt_1x": (PLAIN, R101),
    "fpt/mask_rcnn_r101_bfp_1x": (PLAIN, R101 | kinds()),
    "fpt/faster_rcnn_r50_fpt_1x": (PLAIN, BOXES),
    "fpt/faster_rcnn_r50_bfp_1x": (PLAIN, BOXES | kinds()),
    "fpt/faster_rcnn_r101_fpt_1x": (PLAIN, BOXES | R101),
    "fpt/faster_rcnn_r101_bfp_1x": (PLAIN, BOXES | R101 | kinds()),
    "fpt/faster_rcnn_r50_fpt_paper": (
        ONE, BOXES | {"SOLVER.MAX_ITER": 100_000, "SOLVER.STEPS": (80_000,)}),
    "fpt/faster_rcnn_r50_bfp_paper": ("fpt/faster_rcnn_r50_fpt_paper", kinds()),
    ONE: (PLAIN, {
        "MODEL.BACKBONE.FREEZE_AT": 5,
        "MODEL.FPT.NORM": "SyncBN",
        "INPUT.MAX_SIZE_TRAIN": 1000,
        "INPUT.MAX_SIZE_TEST": 1000,
        "SOLVER.BASE_LR": 0.05,
        "SOLVER.MAX_ITER": 160_000,
        "SOLVER.STEPS": (120_000,),
        "SOLVER.WARMUP_ITERS": 1000,
        "SOLVER.WARMUP_FACTOR": 0.001,
        "SOLVER.CHECKPOINT_PERIOD": 20_000,
        "TEST.EVAL_PERIOD": 20_000,
    }),
    "fpt/table1/bfp": (ONE, kinds()),
    **{f"fpt/table1/{'_'.join(k)}": (ONE, kinds(*k)) for k in (
        ("st",), ("gt",), ("rt",), ("st", "gt"), ("st", "rt"), ("gt", "rt"))},
    f"{TWO}/syncbn": (ONE, norm("SyncBN", drop=False)),
    f"{TWO}/dropblock": (ONE, norm("BN", drop=True)),
    f"{TWO}/plain": (ONE, norm("BN", drop=False)),
    f"{TWO}/gn_dropblock": (ONE, norm("GN", drop=True)),
    f"{TWO}/gn": (ONE, norm("GN", drop=False)),
    f"{THREE}/fpt": (ONE, R101),
    f"{THREE}/bfp": (ONE, R101 | kinds()),
    f"{THREE}/fpn": (
        ONE, R101 | FPN | {"MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"]}),
    f"{THREE}/bpa": (ONE, R101 | BPA),
    **{f"{THREE}/{k}_{n}": (f"{THREE}/{n}", CONTEXT[k]) for k in CONTEXT for n in ("fpt", "bfp")},
    f"{THREE}/fpt_ah": (f"{THREE}/fpt", AUGMENTED_HEAD),
    f"{THREE}/fpt_mt": (f"{THREE}/fpt", MULTI_SCALE),
    **{f"{THREE}/{n}_all": (f"{THREE}/{n}", AUGMENTED_HEAD | MULTI_SCALE)
       for n in ("fpt", "fpn", "bpa")},
    "sr/mask_rcnn_r50_fpn_1x": ("a2fpn/mask_rcnn_r50_fpn_1x", FPN | {
        "SOLVER.IMS_PER_BATCH": 16,
        "SOLVER.BASE_LR": 0.02,
        "SOLVER.MAX_ITER": 87_950,
        "SOLVER.STEPS": (58_633, 80_620),
        "SOLVER.CHECKPOINT_PERIOD": 7329,
        "TEST.EVAL_PERIOD": 7329,
    }),
    **{f"sr/mask_rcnn_{b}_fpn_1x": ("sr/mask_rcnn_r50_fpn_1x", BACKBONES[b])
       for b in ("r101", "x101_32x4d")},
    **{f"sr/mask_rcnn_{b}_fpn_sr_1x": (f"sr/mask_rcnn_{b}_fpn_1x", SR) for b in BACKBONES},
    **{f"sr/mask_rcnn_{b}_fpn_nl_1x": (f"sr/mask_rcnn_{b}_fpn_1x", NL_RES5)
       for b in ("r50", "r101")},
    **{f"sr/cascade_mask_rcnn_{b}_{n}_1x": (f"sr/mask_rcnn_{b}_{n}_1x", CASCADE)
       for b in BACKBONES for n in ("fpn", "fpn_sr")},
    "sr/mask_rcnn_r50_fpn_sr_lite_1x": (
        "sr/mask_rcnn_r50_fpn_sr_1x", {"MODEL.SR.REDUCTION": 64}),
    "sr/mask_rcnn_r50_a2fpn_lite_sr_1x": ("a2fpn/mask_rcnn_r50_a2fpn_lite_1x", SR),
    "sr/mask_rcnn_r50_fpt_sr_1x": (PLAIN, SR),
    **{f"panoptic/panoptic_fpn_{b}_{n}_1x": (f"sr/mask_rcnn_{b}_{n}_1x", PANOPTIC)
       for b in BACKBONES for n in ("fpn", "fpn_sr")},
    **{f"panoptic/panoptic_fpn_{b}_fpn_nl_1x": (f"sr/mask_rcnn_{b}_fpn_nl_1x", PANOPTIC)
       for b in ("r50", "r101")},
    **{f"panoptic/panoptic_fpn_{b}_{n}_1x": (f"panoptic/panoptic_fpn_{b}_fpn_1x", neck)
       for b in ("r50", "r101") for n, neck in (("fpt", FPT), ("a2fpn_lite", A2FPN_LITE))},
}  # fmt: skip
FPT_PARAMETERS = 27_428_352 + 984_064  # block and projections


@pytest.fixture(autouse=True, scope="module")
def _catalogs():
    with restored_catalogs():
        yield


@pytest.mark.parametrize("row", ROWS)
def test_it_changes_only_what_its_name_says(row):
    baseline, expected = ROWS[row]
    assert differences(f"{row}.yaml", f"{baseline}.yaml") == expected


def test_every_file_stands_in_the_table():
    folders = {"fpt", "sr", "panoptic"}
    names = {name.removesuffix(".yaml") for name in RUNS if Path(name).parts[0] in folders}
    assert {name for name in names if not name.endswith("_instant")} == {*ROWS, PLAIN}


def test_fpt_is_the_papers():
    found = differences(f"{PLAIN}.yaml", "a2fpn/mask_rcnn_r50_a2fpn_1x.yaml")
    assert found == FPT
    model = load(f"{ONE}.yaml").MODEL
    assert (model.FPT.BASE, model.FPT.PAIRS) == ("bfp", "all")
    assert (model.FPT.ST_PARTS, model.FPT.GT_PARTS) == (2, 4)
    assert (model.FPT.DROPBLOCK_SIZE, model.FPT.DROPBLOCK_PROB) == (5, 0.1)
    assert (model.ROI_HEADS.BATCH_SIZE_PER_IMAGE, model.ROI_HEADS.POSITIVE_FRACTION) == (512, 0.25)


def test_context_is_where_the_files_say():
    node = load(f"{THREE}/gc_fpt.yaml").MODEL.CONTEXT_BLOCK
    assert (node.STAGES, node.BLOCKS, node.REDUCTION) == (["res3", "res4", "res5"], "all", 16)
    node = load("sr/mask_rcnn_r50_fpn_sr_1x.yaml").MODEL.SR
    assert (node.STAGES, node.BLOCKS, node.REDUCTION, node.NODES) == (["res5"], "all", 2, 16)
    assert (node.SQUEEZE, node.REASON, node.NORM, node.NODE_NORM) == ("ghp", "gcn", "SyncBN", "LN")
    assert node.ZERO_INIT


# ---- parameters ------------------------------------------------------------------------------
def parts(name: str) -> tuple[int, int]:
    """Parameters of the bottom-up network and of the neck."""
    with torch.device("meta"):
        backbone = build_backbone(load(f"{name}.yaml"))
    counts = [sum(p.numel() for p in part.parameters()) for part in (backbone.bottom_up, backbone)]
    return counts[0], counts[1] - counts[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (PLAIN, FPT_PARAMETERS),
        (f"{THREE}/fpt", FPT_PARAMETERS),
        ("panoptic/panoptic_fpn_r101_fpt_1x", FPT_PARAMETERS),
        ("fpt/mask_rcnn_r50_fpt_small_1x", 15_421_696 + 984_064),
        ("fpt/mask_rcnn_r50_bfp_1x", 984_064),
        # a complete FPN: projections, and one 3x3 convolution of 590 080 per level
        ("fpt/mask_rcnn_r50_fpn_fpt_1x", FPT_PARAMETERS + 4 * 590_080),
        ("fpt/table1/st", 5_776_384 + 984_064),
        ("fpt/table1/gt", 7_486_976 + 984_064),
        ("fpt/table1/rt", 18_887_680 + 984_064),
        ("fpt/table1/st_gt", 10_902_016 + 984_064),
        ("fpt/table1/st_rt", 22_302_720 + 984_064),
        ("fpt/table1/gt_rt", 24_013_312 + 984_064),
        (f"{THREE}/bpa", NECK_PARAMETERS["pafpn"]),
        (f"{THREE}/fpn", NECK_PARAMETERS["fpn"]),
        ("panoptic/panoptic_fpn_r50_a2fpn_lite_1x", NECK_PARAMETERS["a2fpn_lite"]),
    ],
)
def test_necks_have_the_closed_forms(name, expected):
    assert parts(name)[1] == expected


def sr_parameters(c: int, reduction: int, k: int = 16) -> int:
    p = c // reduction
    d = p // k
    return 3 * c * p + c + 2 * c + k * k + d * d + 2 * k + 2 * d


@pytest.mark.parametrize(
    ("name", "plain", "expected"),
    [
        ("sr/mask_rcnn_r50_fpn_sr_1x", "sr/mask_rcnn_r50_fpn_1x", 3 * sr_parameters(2048, 2)),
        ("sr/mask_rcnn_r101_fpn_sr_1x", "sr/mask_rcnn_r101_fpn_1x", 3 * sr_parameters(2048, 2)),
        ("sr/mask_rcnn_r50_fpn_sr_lite_1x", "sr/mask_rcnn_r50_fpn_1x", 3 * sr_parameters(2048, 64)),
        ("sr/mask_rcnn_r50_fpn_nl_1x", "sr/mask_rcnn_r50_fpn_1x",
         3 * (4 * 2048 * 1024 + 2 * 2048)),
        (f"{THREE}/nl_fpt", f"{THREE}/fpt", 4 * 1024 * 512 + 2 * 1024),
        # attention to one map, C -> h, layer norm, h -> C with h = C / 16; 4, 23, 3 blocks
        (f"{THREE}/gc_fpt", f"{THREE}/fpt",
         sum(n * (c + 2 * c * (c // 16) + c + 3 * (c // 16))
             for n, c in ((4, 512), (23, 1024), (3, 2048)))),
        # of C output channels v are made by attention, with 160 channels of queries and of keys
        (f"{THREE}/aa_fpt", f"{THREE}/fpt",
         sum(n * (-9 * c * v + c * (320 + v) + v * v + 2 * 129 * 20)
             for n, c, v in ((23, 256, 24), (3, 512, 48)))),
    ],
)  # fmt: skip
def test_context_adds_the_closed_forms(name, plain, expected):
    assert parts(name)[0] - parts(plain)[0] == expected


def test_sr_has_the_papers_parameters():
    assert sr_parameters(512, 2) == 395_328
    assert sr_parameters(2048, 2) == 6_302_112
    assert sr_parameters(2048, 64) == 203_048
