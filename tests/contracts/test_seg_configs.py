"""Every configuration of the semantic trainer loads, and says what its name and the paper say."""

from functools import lru_cache
from pathlib import Path

import pytest
import torch
import yaml

from segtrain.analyze import NUM_CLASSES
from segtrain.config.load import load_config
from segtrain.config.schema import RunConfig
from segtrain.models import build_model
from segtrain.models.pretrained import BACKBONES, backbone_of
from tests.contracts.source_tree import ROOT

CONFIGS = ROOT / "configs" / "seg"
FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))
RUNS = [name for name in FILES if not name.startswith("_base_/")]
PAPER = [n for n in RUNS if n.startswith(("segmenter/ade20k", "segmenter/cont", "segmenter/city"))]
ABLATIONS = [name for name in RUNS if name.startswith("segmenter/ablations/dropout_")]
SHARES = [name for name in RUNS if name.startswith("segmenter/ablations/images_")]
# data -> crop, base size, rate, batch, iterations, stride (Segmenter, Sec. 4.2).
RECIPES = {
    "ade20k": ((512, 512), (2048, 512), 1e-3, 8, 160_000, 480),
    "context60": ((480, 480), (4160, 520), 1e-3, 16, 80_000, 448),
    "cityscapes": ((768, 768), (2048, 1024), 1e-2, 8, 80_000, 736),
}
BIG = ((640, 640), (2560, 640), 1e-3, 8, 160_000, 608)
SIZES = {
    "ti16": ("Ti", 16, False),
    "s16": ("S", 16, False),
    "s32": ("S", 32, False),
    "b8": ("B", 8, False),
    "b16": ("B", 16, False),
    "b32": ("B", 32, False),
    "l16": ("L", 16, False),
    "deit_b16": ("B", 16, True),
}
# Rows of the paper's tables: Table 3 and the results on three data sets.
ROWS = {
    "ade20k": {
        *(f"{size}_linear" for size in SIZES),
        "ti16_mask",
        "s16_mask",
        "b16_mask",
        "b32_mask",
        "deit_b16_mask",
        "l16_mask_512",
        "l16_mask_640",
    },
    "context60": {"deit_b16_linear", "deit_b16_mask", "l16_linear", "l16_mask"},
    "cityscapes": {"deit_b16_linear", "deit_b16_mask", "l16_linear", "l16_mask"},
}
# File -> parameters (the specification's table; it differs by data set in K and crop).
PARAMETERS = {
    "ade20k_ti16_linear": 5_712_342,
    "ade20k_ti16_mask": 6_713_388,
    "ade20k_s16_linear": 22_041_366,
    "ade20k_s16_mask": 26_033_964,
    "ade20k_s32_linear": 22_631_190,
    "ade20k_b16_linear": 86_549_910,
    "ade20k_b16_mask": 102_497_580,
    "ade20k_b32_linear": 87_729_558,
    "ade20k_b32_mask": 103_677_228,
    "ade20k_b8_linear": 88_466_838,
    "ade20k_deit_b16_linear": 86_551_446,
    "ade20k_deit_b16_mask": 102_499_116,
    "ade20k_l16_linear": 304_303_254,
    "ade20k_l16_mask_512": 332_644_652,
    "ade20k_l16_mask_640": 333_234_476,
    "context60_l16_linear": 304_084_028,
    "context60_l16_mask": 332_425_336,
    "cityscapes_l16_linear": 305_479_699,
    "cityscapes_l16_mask": 321_224_742,
}


@lru_cache
def load(name: str) -> RunConfig:
    return load_config(CONFIGS / name)


def content(name: str) -> dict:
    return yaml.safe_load((CONFIGS / name).read_text())


def parts_of(name: str) -> tuple[str, str, str]:
    """Data set, encoder, and the rest of a file name."""
    data, _, rest = Path(name).stem.partition("_")
    size = next(s for s in sorted(SIZES, key=len, reverse=True) if rest.startswith(f"{s}_"))
    return data, size, rest.removeprefix(f"{size}_")


def flat(config: RunConfig) -> dict:
    return {
        f"{section}.{key}": value
        for section, values in config.model_dump().items()
        if isinstance(values, dict)
        for key, value in values.items()
    }


def differences(name: str, other: str) -> dict:
    """Keys whose values differ, with those of `name`."""
    one, two = flat(load(name)), flat(load(other))
    return {key: one[key] for key in one if one[key] != two[key]}


# ---- every file ------------------------------------------------------------------------------
@pytest.mark.parametrize("name", RUNS)
def test_it_loads(name):
    assert load(name).output == f"output/{Path(name).stem}"


def test_names_of_runs_are_unlike_each_other():
    stems = [Path(name).stem for name in RUNS]
    assert len(set(stems)) == len(stems)


@pytest.mark.parametrize("name", [n for n in FILES if "_base_" in content(n)])
def test_its_bases_are_ours(name):
    named = content(name)["_base_"]
    for base in named if isinstance(named, list) else [named]:
        path = (CONFIGS / name).parent / base
        assert str(path.resolve().relative_to(CONFIGS)) in FILES


def test_every_base_is_used():
    used = {"_base_/multi_scale.yaml"}  # for evaluation, by hand
    for name in FILES:
        named = content(name).get("_base_", [])
        for base in named if isinstance(named, list) else [named]:
            used.add(str(((CONFIGS / name).parent / base).resolve().relative_to(CONFIGS)))
    assert {name for name in FILES if name.startswith("_base_/")} <= used


def test_every_method_can_be_tried_in_an_instant():
    for folder in {Path(name).parts[0] for name in RUNS}:
        assert list((CONFIGS / folder).glob("*_instant.yaml")), folder


# ---- the paper's recipes ---------------------------------------------------------------------
def test_every_row_of_the_tables_has_a_file():
    found: dict[str, set[str]] = {data: set() for data in ROWS}
    for name in PAPER:
        data, _, rest = Path(name).stem.partition("_")
        if not rest.endswith("_released"):
            found[data].add(rest)
    assert found == ROWS


@pytest.mark.parametrize("name", PAPER)
def test_recipe_of_the_paper(name):
    data, size, rest = parts_of(name)
    run = load(name)
    crop, base, rate, batch, iters, stride = BIG if "640" in rest else RECIPES[data]
    assert (run.data.crop, run.data.base_size) == (crop, base)
    # 64 epochs of 20210 images.
    iters = 64 * 20210 // 8 if rest.endswith("released") else iters
    assert (run.optim.lr, run.train.global_batch, run.train.iters) == (rate, batch, iters)
    assert (run.eval.mode, run.eval.window, run.eval.stride) == ("slide", crop[0], stride)
    assert (run.optim.name, run.optim.momentum, run.optim.nesterov) == ("sgd", 0.9, True)
    assert (run.optim.weight_decay, run.optim.clip_norm) == (0.0, None)
    assert (run.schedule.name, run.schedule.power, run.schedule.warmup_iters) == ("poly", 0.9, 0)
    assert run.schedule.min_lr == (1e-5 if rest.endswith("released") else 0.0)
    assert (run.data.scale, run.data.cat_max_ratio, run.data.flip) == ((0.5, 2.0), 0.75, 0.5)
    model = run.model
    assert (model.variant, model.patch_size, model.distilled) == SIZES[size]
    assert model.decoder == rest.partition("_")[0]
    assert (model.dropout, model.drop_path_rate) == (0.0, 0.1)
    assert (model.decoder_dropout, model.decoder_drop_path) == (0.1, 0.0)
    last = (data, size, rest) == ("cityscapes", "l16", "mask")
    assert model.decoder_layers == (1 if last else 2)


@pytest.mark.parametrize("name", PAPER)
def test_encoder_starts_from_the_papers_weights(name):
    model = load(name).model
    entry = backbone_of(model)
    assert entry == BACKBONES[model.pretrained]
    assert entry.image_size == (224 if model.patch_size == 8 else 384)


@pytest.mark.parametrize("stem", PARAMETERS)
def test_parameters_of_the_paper(stem):
    run = load(f"segmenter/{stem}.yaml")
    with torch.device("meta"):
        model = build_model(run.model, NUM_CLASSES[run.data.dataset], image_size=run.data.crop)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[stem]


@pytest.mark.parametrize("name", [n for n in PAPER if n.endswith("_released.yaml")])
def test_released_preset_changes_what_the_specification_lists_and_no_more(name):
    expected = {"schedule.min_lr": 1e-5, "train.iters": 161_680}
    if "640" in name:  # images are resized as the data set says, not the model
        expected["eval.base_size"] = (2048, 512)
    assert differences(name, name.replace("_released", "")) == expected


# ---- the paper's ablations -------------------------------------------------------------------
def test_table_2_is_complete():
    grid = {(load(name).model.dropout, load(name).model.drop_path_rate) for name in ABLATIONS}
    assert grid == {(a, b) for a in (0.0, 0.1, 0.2) for b in (0.0, 0.1, 0.2)} - {(0.0, 0.1)}


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation_changes_what_its_name_says(name):
    _, dropout, _, depth = Path(name).stem.split("_")
    changed = differences(name, "segmenter/ade20k_s16_linear.yaml")
    assert set(changed) <= {"model.dropout", "model.drop_path_rate"}
    model = load(name).model
    assert (model.dropout, model.drop_path_rate) == (int(dropout) / 10, int(depth) / 10)


def test_table_5_is_complete():
    """Numbers of training images; 20k is all of them."""
    for name in SHARES:
        count = 1000 * int(Path(name).stem.removeprefix("images_").removesuffix("k"))
        changed = differences(name, "segmenter/ade20k_s16_linear.yaml")
        assert changed == {"data.train_images": count}
    counts = {load(name).data.train_images for name in SHARES}
    assert counts == {4000, 8000, 12000, 16000}


# ---- runs for this machine -------------------------------------------------------------------
@pytest.mark.parametrize("name", [n for n in RUNS if n.endswith(("_instant.yaml", "_small.yaml"))])
def test_small_runs_need_neither_gpu_nor_weights(name):
    run = load(name)
    assert (run.model.pretrained, run.init) == (None, None)
    assert run.train.precision == "fp32"
    with torch.device("meta"):
        model = build_model(run.model, 12, image_size=run.data.crop)
    assert sum(p.numel() for p in model.parameters()) < 5_000_000
