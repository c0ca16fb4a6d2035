"""Configurations of Squeeze Reasoning: the paper's recipes, tables and parameters."""

from pathlib import Path

import pytest
import torch

from segtrain.analyze import NUM_CLASSES
from segtrain.models import build_model
from tests.contracts.test_seg_configs import RUNS, differences, load

OURS = [name for name in RUNS if name.startswith("sr/")]
TABLE_3 = [name for name in OURS if "/table3/" in name]
TABLE_4 = [name for name in OURS if "/table4/" in name]
BASE = "sr/cityscapes_r50_sr.yaml"
# Paper's recipe by the beginning of the name: data set, crop, rate, batch, iterations, mode.
RECIPES = {
    "sr/cityscapes_r50_sr.": ("cityscapes", (769, 769), 1e-2, 8, 50_000, "slide"),
    "sr/cityscapes_r50_fcn": ("cityscapes", (769, 769), 1e-2, 8, 50_000, "slide"),
    "sr/table": ("cityscapes", (769, 769), 1e-2, 8, 50_000, "slide"),
    "sr/cityscapes_r50_sr_sota": ("cityscapes", (769, 769), 1e-2, 8, 120_000, "slide"),
    "sr/cityscapes_r101": ("cityscapes", (769, 769), 1e-2, 8, 120_000, "slide"),
    "sr/cityscapes_wrn38": ("cityscapes", (769, 769), 1e-2, 8, 120_000, "slide"),
    "sr/cityscapes_dfseg": ("cityscapes", (1024, 1024), 1e-2, 16, 50_000, "whole"),
    "sr/cityscapes_srnet": ("cityscapes", (1024, 1024), 1e-2, 16, 50_000, "whole"),
    "sr/camvid_r": ("camvid", (640, 640), 1e-2, 8, 4600, "slide"),
    "sr/context59": ("context59", (480, 480), 1e-3, 16, 31_240, "slide"),
    "sr/ade20k": ("ade20k", (512, 512), 1e-2, 16, 151_575, "slide"),
}
PAPER = [name for name in OURS if name.startswith(tuple(RECIPES))]
# File below configs/seg/sr -> parameters, the auxiliary classifier included.
AUX = 1024 * 256 * 9 + 256 + 512 + 256 * 19 + 19
PARAMETERS = {
    "cityscapes_r50_fcn": 23_631_808 + 11_798_528 + 9_747 + AUX,
    "cityscapes_r50_sr": 23_631_808 + 11_798_528 + 9_747 + 395_328 + AUX,
    "table3/cityscapes_r50_gap_gcn": 23_631_808 + 11_798_528 + 9_747 + 264_256 + AUX,
    "table4/cityscapes_r50_psp": 23_631_808 + 23_073_792 + 9_747 + AUX,
    "table4/cityscapes_r50_aspp": 23_631_808 + 15_535_104 + 256 * 19 + 19 + AUX,
    "cityscapes_r101_sr_sota": 42_623_936 + 11_798_528 + 9_747 + 395_328 + AUX,
    "cityscapes_r50_sr_official_2021": 23_631_808 + 24_001_699 + AUX,
    "cityscapes_r50_sr_official_2024": 23_631_808 + 3_815_587 + AUX,
    "cityscapes_dfseg_v1": 9_370_931,
    "cityscapes_dfseg_v2": 18_825_011,
    "cityscapes_srnet_dfv2": 18_874_995,
    "cityscapes_wrn38": 137_112_659,
}


@pytest.mark.parametrize("name", PAPER)
def test_recipe_of_the_paper(name):
    run = load(name)
    key = max((key for key in RECIPES if name.startswith(key)), key=len)
    data, crop, rate, batch, iters, mode = RECIPES[key]
    assert (run.data.dataset, run.data.crop) == (data, crop)
    assert (run.optim.lr, run.train.global_batch, run.train.iters) == (rate, batch, iters)
    assert (run.optim.name, run.optim.momentum, run.optim.nesterov) == ("sgd", 0.9, False)
    assert (run.optim.weight_decay, run.optim.norm_weight_decay) == (5e-4, 5e-4)
    assert (run.schedule.name, run.schedule.power, run.schedule.min_lr) == ("poly", 0.9, 0.0)
    assert (run.eval.mode, run.model.align_corners) == (mode, True)
    scale = (0.75, 2.0) if mode == "whole" else (0.5, 2.0)
    assert (run.data.scale, run.data.photometric, run.data.cat_max_ratio) == (scale, False, 1.0)
    sota = iters == 120_000
    assert (run.loss.kind, run.loss.aux_weight) == ("ohem" if sota else "ce", 0.4)
    dilated = run.model.backbone.name == "resnet"
    assert (run.model.aux is not None) == dilated
    if dilated:
        backbone = run.model.backbone
        assert (backbone.stem, backbone.output_stride, backbone.multi_grid) == ("deep64", 8, False)
        assert backbone.pretrained == f"resnet{backbone.depth}s.gluon_in1k"


def test_every_other_file_is_known():
    rest = {Path(name).stem for name in OURS if name not in PAPER}
    known = {"cityscapes_r50_sr_literal", "sr_instant"}
    known |= {f"cityscapes_r50_sr_official_{year}" for year in (2021, 2024)}
    small = {"fcn", "sr_ghp", "sr_gap", "nl", "psp", "srnet_df1", "dfseg_v1"}
    assert rest == known | {f"camvid_{head}_small" for head in small}


def test_table_3_is_complete():
    grid = set()
    for name in TABLE_3:
        reasoning = load(name).model.head.sr
        assert Path(name).stem == f"cityscapes_r50_{reasoning.squeeze}_{reasoning.reason}"
        grid.add((reasoning.squeeze, reasoning.reason))
        assert set(differences(name, BASE)) <= {"model.head"}
    assert grid == {(s, r) for s in ("gap", "ghp") for r in ("none", "fc", "gcn", "sa")}


def test_table_4_is_complete():
    found = set()
    for name in TABLE_4:
        head = load(name).model.head
        kind = head.module if head.name == "context" else head.name
        assert Path(name).stem == f"cityscapes_r50_{kind}"
        found.add(kind)
        assert set(differences(name, BASE)) == {"model.head"}
    others = {"se", "nl", "a2", "cgnl", "rcca", "encoding", "apnb", "emau"}
    assert found == others | {"psp", "aspp", "gc", "oc"}


def test_literal_differs_in_what_it_says():
    literal, base = load("sr/cityscapes_r50_sr_literal.yaml"), load(BASE)
    assert set(differences("sr/cityscapes_r50_sr_literal.yaml", BASE)) == {
        *("model.backbone", "model.head")
    }
    assert literal.model.backbone.multi_grid
    assert not base.model.backbone.multi_grid
    assert (literal.model.head.sr.pool, literal.model.head.sr.node_norm) == ("sum", "")


@pytest.mark.parametrize("stem", PARAMETERS)
def test_parameters(stem):
    run = load(f"sr/{stem}.yaml")
    with torch.device("meta"):
        model = build_model(run.model, NUM_CLASSES[run.data.dataset], image_size=run.data.crop)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[stem]


@pytest.mark.parametrize("name", [n for n in OURS if n.endswith("_small.yaml")])
def test_small_runs_differ_in_the_model_only(name):
    other = load("segmenter/camvid_small.yaml")
    run = load(name)
    for section in ("data", "optim", "schedule", "train", "eval", "loss"):
        assert getattr(run, section) == getattr(other, section), section
