import pydantic
import pytest

from segtrain.config.keys import all_keys, keys_at, sections_at
from segtrain.config.schema import (
    SEGMENTER_VARIANTS,
    FolderConfig,
    RunConfig,
    SegmenterConfig,
    window_and_stride,
)
from tests.segtrain.config_files import small


def problems(**changes):
    """Texts of everything that is wrong, without the places."""
    try:
        RunConfig.model_validate(small(**changes))
    except pydantic.ValidationError as error:
        return [line for e in error.errors() for line in str(e["ctx"]["error"]).split("\n")]
    return []


def test_defaults_are_those_of_the_paper():
    config = RunConfig.model_validate(small())
    assert (config.optim.name, config.optim.momentum, config.optim.nesterov) == ("sgd", 0.9, True)
    assert (config.schedule.name, config.schedule.power, config.schedule.min_lr) == ("poly", 0.9, 0)
    assert (config.data.scale, config.data.cat_max_ratio) == ((0.5, 2.0), 0.75)
    model = config.model
    assert (model.dropout, model.drop_path_rate, model.layer_norm_eps) == (0.0, 0.1, 1e-5)
    assert (model.decoder_layers, model.decoder_dropout, model.decoder_drop_path) == (2, 0.1, 0.0)
    assert config.train.ema_decay == 0
    assert config.train.precision == "fp32"
    assert config.optim.weight_decay == 0
    assert config.optim.clip_norm is None


def test_values_do_not_change_and_lists_are_tuples():
    config = RunConfig.model_validate(small())
    assert config.data.crop == (64, 96)
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.train.iters = 3


@pytest.mark.parametrize(("variant", "widths"), SEGMENTER_VARIANTS.items())
def test_heads_of_the_variants_are_64_wide(variant, widths):
    config = SegmenterConfig(name="segmenter", variant=variant)
    assert config.widths == widths
    assert widths[0] == 64 * widths[2]


def test_own_widths():
    config = SegmenterConfig(name="segmenter", embed_dim=24, depth=3, num_heads=2)
    assert config.widths == (24, 3, 2)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model__embed_dim": 64}, "embed_dim would change variant Ti; write variant: null"),
        ({"model__variant": None}, "without a variant, embed_dim, depth, num_heads must be given"),
        (
            {"model": {"name": "segmenter", "embed_dim": 30, "depth": 1, "num_heads": 4}},
            "num_heads 4 must divide embed_dim 30; write embed_dim: 256",
        ),
        ({"data__folder": {}}, "the section folder has no effect on camvid; write dataset: folder"),
        ({"data__scale": [2, 0.5]}, "scale must be [lowest, highest], got [2, 0.5]; swap the two"),
        (
            {"data__base_size": [96, 128]},
            "base_size must be [long side, short side], got [96, 128]",
        ),
        (
            {"train__micro_batch": 3},
            "micro_batch 3 must divide global_batch 8; write micro_batch: 2",
        ),
        ({"optim__momentum": 0}, "nesterov needs a momentum; write nesterov: false"),
        ({"schedule__name": "step"}, "step needs steps: [ITERATION, ...]"),
        ({"schedule__steps": [5]}, "steps has no effect on poly; write name: step or steps: []"),
        ({"schedule": {"name": "step", "steps": [9, 5]}}, "steps must grow, got [9, 5]; sort them"),
        (
            {"schedule": {"name": "step", "steps": [50, 100]}},
            "schedule.steps must be below train.iters 100, got 100",
        ),
        (
            {"schedule__warmup_iters": 100},
            "schedule.warmup_iters 100 must be below train.iters 100; "
            "write schedule.warmup_iters: 10",
        ),
        ({"schedule__min_lr": 0.01}, "schedule.min_lr 0.01 must not exceed optim.lr 0.001"),
        ({"eval__window": 8}, "eval.window 8 must be at least 16, what the model takes; raise it"),
        ({"data__crop": [64, 8]}, "data.crop 8 must be at least 16, what the model"),
        ({"eval__stride": 65}, "eval.stride 65 must not exceed the window 64, pixels between"),
    ],
)
def test_contradictions_are_told_with_the_fix(changes, text):
    found = problems(**changes)
    assert len(found) == 1
    assert found[0].startswith(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"data__crop": [65, 97]},
        {"train__micro_batch": 8},
        {"optim__momentum": 0, "optim__nesterov": False},
        {"optim__name": "adamw", "optim__momentum": 0},
        {"schedule": {"name": "step", "steps": [50, 99]}},
        {"schedule__min_lr": 0.001},
        {"eval__stride": 64},
        {"eval__window": 16},
        {"data__dataset": "folder"},
        {"train__sync_bn": False},
        {"train__sync_bn": "auto"},
    ],
)
def test_what_is_allowed(changes):
    assert problems(**changes) == []


def test_several_contradictions_are_told_together():
    assert len(problems(schedule__min_lr=0.01, schedule__warmup_iters=200)) == 2


@pytest.mark.parametrize(
    ("folder", "text"),
    [
        ({"binary": True, "reduce_zero": True}, "reduce_zero and binary contradict each other"),
        ({"mapping": {1: 0}, "palette": {"a": [0, 0, 0]}}, "mapping and palette contradict"),
        ({"classes": ["a", "b", "a"]}, "classes names a twice"),
    ],
)
def test_contradictions_of_a_folder(folder, text):
    assert problems(data__dataset="folder", data__folder=folder)[0].startswith(text)


def test_folder_takes_names_or_a_file():
    assert FolderConfig(classes=["a", "b"]).classes == ("a", "b")
    assert FolderConfig(classes="names.txt").classes == "names.txt"
    assert FolderConfig(mapping={7: 0, 300: 255}).mapping == {7: 0, 300: 255}


@pytest.mark.parametrize(
    ("crop", "evaluation", "expected"),
    [
        ([512, 512], {}, (512, 480)),
        ([768, 768], {}, (768, 736)),
        ([512, 640], {}, (512, 480)),
        ([64, 64], {}, (64, 32)),
        ([33, 99], {}, (33, 17)),
        ([512, 512], {"window": 256}, (256, 224)),
        ([512, 512], {"stride": 512}, (512, 512)),
    ],
)
def test_window_and_stride(crop, evaluation, expected):
    config = RunConfig.model_validate(small(data__crop=crop, eval=evaluation))
    assert window_and_stride(config) == expected


def test_every_key_says_what_it_is():
    for path in all_keys():
        if keys_at(path) or len(path) == 1:
            continue
        for section in sections_at(path[:-1]):
            if path[-1] in section.model_fields:
                assert section.model_fields[path[-1]].description, path
