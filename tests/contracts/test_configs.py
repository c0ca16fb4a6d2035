"""Every configuration of the Detectron2 plug-in loads, and says what its name promises."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone

from d2ctx.config import load_config
from d2ctx.config_file import all_keys, get_value
from tests.contracts.source_tree import ROOT
from tests.d2ctx.toy_coco import restored_catalogs

CONFIGS = ROOT / "configs" / "d2"
FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))
RUNS = [name for name in FILES if not name.startswith("_base_/")]
PAPER = [name for name in RUNS if name.endswith("_1x.yaml")]
ABLATIONS = [name for name in RUNS if "/ablations/" in name]
# Folders that hold no method of their own.
SHARED_FOLDERS = {"_base_", "compare", "data", "demo", "real"}

PAFPN, FULL = "a2fpn/mask_rcnn_r50_pafpn_1x.yaml", "a2fpn/mask_rcnn_r50_a2fpn_1x.yaml"
# Rows of Tables 2 to 5 of the paper: file -> what it changes, over which baseline.
SWITCHES: dict[str, tuple[dict[str, Any], str]] = {
    "mgc": ({"LATERAL": "mgc"}, PAFPN),
    "gacarafe": ({"TOP_DOWN": "gacarafe"}, PAFPN),
    "gacap": ({"BOTTOM_UP": "gacap"}, PAFPN),
    "mgc_gacarafe": ({"LATERAL": "mgc", "TOP_DOWN": "gacarafe"}, PAFPN),
    "mgc_gacap": ({"LATERAL": "mgc", "BOTTOM_UP": "gacap"}, PAFPN),
    "gacarafe_gacap": ({"TOP_DOWN": "gacarafe", "BOTTOM_UP": "gacap"}, PAFPN),
    "a2fpn_no_gcn": ({"GCN": False}, FULL),
    "mgc_no_gcn": ({"LATERAL": "mgc", "GCN": False}, PAFPN),
    "carafe": ({"TOP_DOWN": "carafe"}, PAFPN),
    "cap": ({"BOTTOM_UP": "cap"}, PAFPN),
    "mgc_contexts_flat": ({"LATERAL": "mgc", "NUM_CONTEXTS": [160] * 4}, PAFPN),
    "mgc_contexts_rising": ({"LATERAL": "mgc", "NUM_CONTEXTS": [64, 128, 192, 256]}, PAFPN),
    "gacarafe_sigmoid": ({"TOP_DOWN": "gacarafe", "GATE": "sigmoid"}, PAFPN),
    "gacap_sigmoid": ({"BOTTOM_UP": "gacap", "GATE": "sigmoid"}, PAFPN),
}
NECK_PARAMETERS = {
    "a2fpn": 16_661_500,
    "a2fpn_lite": 7_997_757,
    "pafpn": 6_884_864,
    "fpn": 3_344_384,
}
COCO_IMAGES, EPOCHS, DROPS = 117_266, 12, (8, 11)  # of train2017 with at least one object


@pytest.fixture(autouse=True, scope="module")
def _catalogs():
    with restored_catalogs():
        yield


@lru_cache
def load(name: str) -> CfgNode:
    """The configuration as `projects/train_net.py` sees it, which needs no data yet."""
    return load_config(str(CONFIGS / name))


def content(name: str) -> dict[str, Any]:
    """What stands in the file itself."""
    return yaml.safe_load((CONFIGS / name).read_text())


def differences(name: str, other: str) -> dict[str, Any]:
    """Keys whose values differ, with those of `name`; where results go is left out."""
    one, two = load(name), load(other)
    leaves = [key for key in all_keys(one) if not isinstance(get_value(one, key), CfgNode)]
    assert set(all_keys(one)) >= set(all_keys(two))
    known = set(all_keys(two))
    changed = {
        key: get_value(one, key)
        for key in leaves
        if key not in known or get_value(one, key) != get_value(two, key)
    }
    del changed["OUTPUT_DIR"]
    return changed


# ---- every file ------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FILES)
def test_it_loads_and_names_registered_parts_only(name):
    assert load(name).is_frozen()


@pytest.mark.parametrize("name", [name for name in FILES if "_BASE_" in content(name)])
def test_its_base_is_one_of_ours(name):
    named = content(name)["_BASE_"]
    for base in named if isinstance(named, list) else [named]:
        path = (CONFIGS / name).parent / base
        assert str(path.resolve().relative_to(CONFIGS)) in FILES


def test_every_run_has_an_output_folder_of_its_own():
    folders = [content(name).get("OUTPUT_DIR") for name in RUNS]
    assert None not in folders
    assert len(set(folders)) == len(folders)


def test_every_method_can_be_tried_in_an_instant():
    folders = {Path(name).parts[0] for name in RUNS} - SHARED_FOLDERS
    assert folders
    for folder in folders:
        assert list((CONFIGS / folder).glob("*_instant.yaml")), folder


@pytest.mark.parametrize("name", [name for name in RUNS if name.endswith("_instant.yaml")])
def test_instant_runs_need_neither_gpu_nor_weights(name):
    cfg = load(name)
    assert cfg.MODEL.DEVICE == "cpu"
    assert cfg.MODEL.WEIGHTS == ""
    assert cfg.SOLVER.MAX_ITER <= 20


# ---- the paper's recipes ---------------------------------------------------------------------
@pytest.mark.parametrize("name", PAPER + ABLATIONS)
def test_schedule_is_12_epochs_with_drops_after_8_and_11(name):
    solver = load(name).SOLVER
    per_epoch = COCO_IMAGES / solver.IMS_PER_BATCH
    assert (solver.IMS_PER_BATCH, solver.BASE_LR) in {(8, 0.01), (16, 0.02)}
    assert solver.MAX_ITER == round(EPOCHS * per_epoch)
    assert solver.STEPS == tuple(round(epoch * per_epoch) for epoch in DROPS)


@pytest.mark.parametrize("name", [name for name in PAPER if "_r101_" in name])
def test_resnet_101_changes_nothing_but_depth_and_weights(name):
    assert differences(name, name.replace("_r101_", "_r50_")) == {
        "MODEL.RESNETS.DEPTH": 101,
        "MODEL.WEIGHTS": "detectron2://ImageNetPretrained/torchvision/R-101.pkl",
    }


@pytest.mark.parametrize("neck", NECK_PARAMETERS)
@pytest.mark.parametrize("depth", [50, 101])
def test_neck_has_the_papers_parameters(neck, depth):
    with torch.device("meta"):
        backbone = build_backbone(load(f"a2fpn/mask_rcnn_r{depth}_{neck}_1x.yaml"))
    counts = [sum(p.numel() for p in part.parameters()) for part in (backbone, backbone.bottom_up)]
    assert counts[0] - counts[1] == NECK_PARAMETERS[neck]


# ---- the paper's ablations -------------------------------------------------------------------
def test_every_ablation_stands_in_the_table_of_this_file():
    assert {Path(name).stem for name in ABLATIONS} == set(SWITCHES)


@pytest.mark.parametrize("row", SWITCHES)
def test_ablation_changes_only_what_its_name_says(row):
    switches, baseline = SWITCHES[row]
    expected = {f"MODEL.A2FPN.{key}": value for key, value in switches.items()}
    assert differences(f"a2fpn/ablations/{row}.yaml", baseline) == expected


@pytest.mark.parametrize("row", SWITCHES)
def test_every_parameter_of_an_ablations_neck_takes_part(row):
    cfg = load(f"a2fpn/ablations/{row}.yaml").clone()
    cfg.defrost()
    narrow = {"OUT_CHANNELS": 16, "CONTEXT_CHANNELS": 8, "REDUCTION_CHANNELS": 8}
    contexts = [n // 16 for n in cfg.MODEL.A2FPN.NUM_CONTEXTS or (256, 192, 128, 64)]
    cfg.MODEL.A2FPN.update(narrow, NUM_CONTEXTS=contexts)
    cfg.MODEL.RESNETS.update(STEM_OUT_CHANNELS=8, RES2_OUT_CHANNELS=16, WIDTH_PER_GROUP=4)
    torch.manual_seed(0)
    backbone = build_backbone(cfg)
    maps = backbone(torch.randn(1, 3, 64, 64))
    sum(m.square().mean() for m in maps.values()).backward()
    assert all(m.isfinite().all() for m in maps.values())
    idle = [name for name, p in backbone.neck.named_parameters() if p.grad is None]
    assert not idle
