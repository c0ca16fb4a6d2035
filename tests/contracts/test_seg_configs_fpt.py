"""Configurations of FPT and of the all-MLP baseline: rows of the tables, recipes, sizes."""

from pathlib import Path

import pytest
import torch

from segtrain.analyze import NUM_CLASSES
from segtrain.models import build_model
from tests.contracts.test_seg_configs import RUNS, differences, load

OURS = [name for name in RUNS if name.startswith("fpt/")]
PAPER = [n for n in OURS if not n.endswith(("_small.yaml", "_instant.yaml"))]
SMALL = [n for n in RUNS if n.startswith(("fpt/", "mlp/")) and n.endswith("_small.yaml")]
# data -> crop, base size, rate, decay, images of the training split, epochs (FPT, Sec. 4.2).
RECIPES = {
    "cityscapes": ((969, 969), (2048, 1024), 0.01, 5e-4, 2975, 120),
    "lip": ((573, 573), (2048, 573), 0.01, 5e-4, 30462, 50),
    "voc": ((521, 521), (2048, 521), 0.01, 5e-4, 1464, 80),
    "ade20k": ((569, 569), (2048, 569), 0.02, 1e-4, 20210, 120),
}
# Row of Table 4 -> ST, GT, RT.
TABLE_4 = {
    "ufp_st": (True, "none", False),
    "ufp_lgt": (False, "lgt", False),
    "ufp_rt": (False, "none", True),
    "ufp_lgt_st": (True, "lgt", False),
    "ufp_rt_st": (True, "none", True),
    "ufp_lgt_rt": (False, "lgt", True),
}
# Row of Table 5 -> pyramid, context.
TABLE_5 = {f"{p}_{c}": (p, c) for p in ("ppm", "aspp", "ufp") for c in ("oc", "fpt")}


def data_of(name: str) -> str:
    return Path(name).stem.partition("_")[0]


def test_every_row_of_the_tables_has_a_file():
    expected = {f"table4/cityscapes_{row}" for row in ("ufp", *TABLE_4)}
    for data in RECIPES:
        expected |= {f"table5/{data}_{row}" for row in TABLE_5} | {f"table5/{data}_r101_plain"}
        expected -= {f"table5/{data}_ufp_fpt"}
        expected |= {f"{data}_ufp_fpt"}
    found = {name.removeprefix("fpt/").removesuffix(".yaml") for name in PAPER}
    assert found == expected | {"cityscapes_ufp_fpt_frozen"}


@pytest.mark.parametrize("name", PAPER)
def test_recipe_of_the_paper(name):
    data = data_of(name)
    run = load(name)
    crop, base, rate, decay, images, epochs = RECIPES[data]
    assert (run.data.dataset, run.data.crop, run.data.base_size) == (data, crop, base)
    assert (run.data.scale, run.data.flip, run.data.photometric) == ((0.5, 2.0), 0.5, False)
    assert run.data.short_sides == ((269, 369, 469, 569) if data == "ade20k" else None)
    optim = run.optim
    assert (optim.name, optim.lr, optim.momentum, optim.nesterov) == ("sgd", rate, 0.9, False)
    assert (optim.weight_decay, optim.norm_weight_decay) == (decay, decay)
    assert (run.schedule.name, run.schedule.power, run.schedule.min_lr) == ("poly", 0.9, 0.0)
    assert run.train.iters == round(images * epochs / run.train.global_batch)
    backbone = run.model.backbone
    assert (backbone.depth, backbone.stem, backbone.output_stride) == (101, "plain", 8)
    assert backbone.pretrained == "resnet101.tv_in1k"
    assert (run.model.aux, run.model.align_corners) == (None, False)
    assert run.model.freeze_backbone == name.endswith("_frozen.yaml")
    assert (run.eval.mode, run.eval.window) == ("slide", crop[0])


@pytest.mark.parametrize(("row", "switches"), TABLE_4.items())
def test_rows_of_table_4(row, switches):
    name = f"fpt/table4/cityscapes_{row}.yaml"
    assert set(differences(name, "fpt/cityscapes_ufp_fpt.yaml")) == {"model.head"}
    head = load(name).model.head
    assert (head.pyramid, head.context) == ("ufp", "fpt")
    assert (head.fpt.st, head.fpt.gt, head.fpt.rt) == switches


def test_the_base_of_table_4_is_the_pyramid_alone():
    head = load("fpt/table4/cityscapes_ufp.yaml").model.head
    assert (head.pyramid, head.context) == ("ufp", "none")


@pytest.mark.parametrize("data", RECIPES)
def test_rows_of_table_5(data):
    best = f"fpt/{data}_ufp_fpt.yaml"
    for row, (pyramid, context) in TABLE_5.items():
        name = best if row == "ufp_fpt" else f"fpt/table5/{data}_{row}.yaml"
        head = load(name).model.head
        assert (head.name, head.pyramid, head.context) == ("fpt", pyramid, context)
        assert set(differences(name, best)) <= {"model.head"}
    plain = load(f"fpt/table5/{data}_r101_plain.yaml").model.head
    assert (plain.name, plain.module) == ("context", "none")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("fpt/cityscapes_ufp_fpt.yaml", 86_184_275),
        ("fpt/table4/cityscapes_ufp.yaml", 61_121_875),
        ("fpt/table4/cityscapes_ufp_lgt_st.yaml", 72_019_283),
        ("fpt/table5/ade20k_ppm_oc.yaml", 47_921_366),
    ],
)
def test_parameters(name, count):
    run = load(name)
    with torch.device("meta"):
        model = build_model(run.model, NUM_CLASSES[run.data.dataset], image_size=run.data.crop)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("name", SMALL)
def test_small_runs_differ_in_the_model_only(name):
    run, other = load(name), load("segmenter/camvid_small.yaml")
    assert run.model_copy(update={"model": other.model, "output": other.output}) == other


def test_the_frozen_backbone_is_the_only_difference():
    one, other = "fpt/cityscapes_ufp_fpt_frozen.yaml", "fpt/cityscapes_ufp_fpt.yaml"
    assert differences(one, other) == {"model.freeze_backbone": True}
