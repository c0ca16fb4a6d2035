"""UN-EPT's configurations say what the paper and the released code say."""

from pathlib import Path

import pytest
import torch

from segtrain.models import build_model
from tests.contracts.test_seg_configs import NUM_CLASSES, RUNS, differences, load

OWN = [name for name in RUNS if name.startswith("unept/")]
PAPER = [n for n in OWN if n.startswith(("unept/ade20k", "unept/context60", "unept/cityscapes"))]
ABLATIONS = [name for name in OWN if "/ablations/" in name]
R50 = "unept/ade20k_unept_r50.yaml"
# data -> crop, base size, iterations, first update with a tenth of the rate, stride (Sec. 4.2).
RECIPES = {
    "ade20k": ((480, 480), (2048, 512), 160_000, 106_667, 160),
    "context60": ((480, 480), (520, 520), 160_000, 106_667, 160),
    "cityscapes": ((768, 768), (2048, 1024), 80_000, 53_333, 256),
}
# File -> parameters (the specification's table).
PARAMETERS = {
    "ade20k_unept_deit_b16": 93_854_678,
    "ade20k_unept_deit_b16_released": 94_842_326,
    "ade20k_unept_r50": 31_370_294,
    "ade20k_unept_r50_released": 32_357_942,
    "context60_unept_deit_b16": 93_831_548,
    "context60_unept_deit_b16_released": 94_819_196,
    "context60_unept_r50": 31_347_164,
    "context60_unept_r50_released": 32_334_812,
    "cityscapes_unept_deit_b16": 94_899_283,
    "cityscapes_unept_r50": 31_336_627,
}
# What the released code does otherwise than the paper says.
RELEASED_HEAD = {
    **{"self_attention": "released", "last_relu": False, "query_embedding": "learned"},
    **{"boundary_classes": 2, "mask_rule": "logit", "refine_at_test": False},
}
RELEASED_LOSS = {
    **{"seg_weight": 0.8, "refined_weight": 1.0, "boundary_weight": 5.0},
    **{"direction_weight": 0.6, "balance": True},
}


def test_every_row_of_the_tables_has_a_file():
    assert {Path(name).stem for name in PAPER} == set(PARAMETERS)


@pytest.mark.parametrize("name", PAPER)
def test_recipe_of_the_paper(name):
    data, rest = Path(name).stem.split("_unept_")
    released = rest.endswith("_released")
    run = load(name)
    crop, base, iters, drop, stride = RECIPES[data]
    assert (run.data.crop, run.data.base_size, run.train.iters) == (crop, base, iters)
    assert (run.data.scale, run.data.cat_max_ratio, run.data.flip) == ((0.5, 2.0), 0.75, 0.5)
    assert (run.train.global_batch, run.optim.name, run.optim.lr) == (16, "adamw", 1e-4)
    assert (run.optim.betas, run.optim.clip_norm) == ((0.9, 0.999), None)
    assert (run.optim.weight_decay, run.optim.norm_weight_decay) == (1e-4, 1e-4)
    assert run.optim.backbone_lr_factor * run.optim.lr == pytest.approx(1e-5)
    assert (run.schedule.name, run.schedule.gamma, run.schedule.warmup_iters) == ("step", 0.1, 0)
    assert run.schedule.steps == (126_000 if released else drop,)
    assert (run.eval.mode, run.eval.window, run.eval.stride) == ("slide", crop[0], stride)
    assert run.eval.pad == "zero"
    assert (run.loss.kind, run.loss.boundary.max_distance) == ("ce", 5)
    assert run.loss.boundary.direction_mask == "predicted"


@pytest.mark.parametrize("name", PAPER)
def test_backbones_of_the_paper(name):
    backbone = load(name).model.backbone
    if "_r50" in name:
        assert (backbone.depth, backbone.stem, backbone.output_stride) == (50, "deep32", 8)
        assert backbone.contract_dilation
        assert backbone.pretrained == "resnet50c.gluon_in1k"
    else:
        assert (backbone.variant, backbone.patch_size, backbone.distilled) == ("B", 16, True)
        assert (backbone.blocks, backbone.drop_path_rate) == ((4, 8, 12), 0.0)
        assert backbone.layer_norm_eps == 1e-6
        assert backbone.pretrained == "deit_base_distilled_patch16_384.fb_in1k"


@pytest.mark.parametrize("stem", PARAMETERS)
def test_parameters_of_the_paper(stem):
    run = load(f"unept/{stem}.yaml")
    with torch.device("meta"):
        model = build_model(run.model, NUM_CLASSES[run.data.dataset], image_size=run.data.crop)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[stem]
    assert model.normalisation == "imagenet"


@pytest.mark.parametrize("name", [n for n in PAPER if n.endswith("_released.yaml")])
def test_released_preset_changes_what_it_names(name):
    plain = name.replace("_released", "")
    changed = differences(name, plain)
    assert set(changed) == {"loss.boundary", "schedule.steps", "model.head"} | (
        {"model.backbone"} if "deit" in name else set()
    )
    released, paper = load(name), load(plain)
    head = paper.model.head.model_dump() | RELEASED_HEAD
    assert released.model.head.model_dump() == head
    loss = paper.loss.boundary.model_dump() | RELEASED_LOSS
    assert released.loss.boundary.model_dump() == loss
    if "deit" in name:
        backbone = paper.model.backbone.model_dump() | {"pos_embed_resize": "bicubic"}
        assert released.model.backbone.model_dump() == backbone


# ---- ablations -------------------------------------------------------------------------------
def test_table_6_is_complete():
    rows = [load(n).model.head for n in ABLATIONS if "levels" in n]
    assert {(h.levels, h.points) for h in rows} == {(a, b) for a in (1, 3) for b in (4, 16, 64)}
    assert not any(head.refine_at_test for head in rows)


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation_changes_what_its_name_says(name):
    paper, head = load(R50).model.head.model_dump(), load(name).model.head.model_dump()
    changed = {key: value for key, value in head.items() if value != paper[key]}
    if "levels" in name:
        _, _, levels, _, points = Path(name).stem.split("_")
        expected = {"levels": int(levels), "points": int(points), "refine_at_test": False}
        assert changed == {k: v for k, v in expected.items() if v != paper[k]}
        assert set(differences(name, R50)) == {"model.head"}
    else:
        expected = {"spatial_branch": False, "query_embedding": "learned"}
        assert changed == expected | ({"levels": 1} if "baseline" in name else {})
        assert set(differences(name, R50)) == {"model.head", "loss.boundary"}
