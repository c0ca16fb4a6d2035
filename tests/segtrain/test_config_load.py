import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from segtrain.config.load import diff, dump_yaml, json_schema, load_config
from segtrain.config.schema import RunConfig
from segtrain.config.yaml_text import read_document
from segtrain.errors import UserError
from tests.segtrain.config_files import SMALL, small, write


@pytest.fixture
def run(tmp_path):
    return write(tmp_path / "run.yaml", SMALL)


def message(path, *overrides):
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_output_is_named_after_the_file(tmp_path, run):
    assert load_config(run).output == "output/run"
    assert load_config(write(tmp_path / "x.yaml", small(output="here"))).output == "here"
    assert load_config(run, ["output=there"]).output == "there"


def test_overrides_are_yaml_and_the_last_wins(run):
    config = load_config(
        run,
        [
            "optim.lr=1",
            "optim.lr=2e-4",
            "data.crop=[32, 48]",
            "eval={flip: true}",
            "init=null",
            "data.root=a=b",
        ],
    )
    assert config.optim.lr == 2e-4
    assert config.data.crop == (32, 48)
    assert config.eval.flip
    assert config.init is None
    assert config.data.root == "a=b"
    assert config.train.iters == 100


def test_later_bases_and_the_file_itself_go_over_earlier_ones(tmp_path):
    (tmp_path / "base").mkdir()
    write(tmp_path / "base" / "a.yaml", small(optim__lr=1.0, train__seed=1, train__keep=1))
    write(tmp_path / "base" / "b.yaml", {"_base_": "c.yaml", "optim": {"lr": 2.0}})
    write(tmp_path / "base" / "c.yaml", {"optim": {"lr": 3.0}, "train": {"seed": 3, "keep": 3}})
    top = {"_base_": ["base/a.yaml", "base/b.yaml"], "train": {"keep": 5}}
    config = load_config(write(tmp_path / "top.yaml", top))
    assert (config.optim.lr, config.train.seed, config.train.keep) == (2.0, 3, 5)
    assert config.train.iters == 100


def test_the_same_base_by_two_ways_is_no_circle(tmp_path):
    write(tmp_path / "a.yaml", SMALL)
    write(tmp_path / "b.yaml", {"_base_": "a.yaml"})
    top = write(tmp_path / "top.yaml", {"_base_": ["a.yaml", "b.yaml"]})
    assert load_config(top).data.root == "camvid"


def test_lists_and_palettes_are_replaced_not_joined(tmp_path):
    folder = {"palette": {"a": [0, 0, 0], "b": [9, 9, 9]}, "images": "x"}
    write(tmp_path / "a.yaml", small(data__dataset="folder", data__folder=folder))
    child = {"_base_": "a.yaml", "data": {"folder": {"palette": {"c": [1, 2, 3]}}}}
    config = load_config(write(tmp_path / "top.yaml", child))
    assert config.data.folder.palette == {"c": (1, 2, 3)}
    assert config.data.folder.images == "x"


def test_circle_of_bases(tmp_path):
    write(tmp_path / "a.yaml", {"_base_": "b.yaml"})
    (tmp_path / "sub").mkdir()
    write(tmp_path / "b.yaml", {"_base_": "sub/../a.yaml"})
    text = message(tmp_path / "a.yaml")
    assert "a.yaml: _base_ goes in a circle: " in text
    assert text.count(" -> ") == 2
    assert "\n" not in text


def test_missing_files(tmp_path):
    assert message(tmp_path / "no.yaml") == f"{tmp_path / 'no.yaml'} does not exist; check the path"
    top = write(tmp_path / "top.yaml", {"_base_": "sub/no.yaml"})
    base = tmp_path / "sub" / "no.yaml"
    assert message(top) == f"_base_ of {top}: {base} does not exist; check the path"
    assert "cannot be read: Is a directory" in message(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", " must hold KEY: VALUE lines, got nothing"),
        ("- 1", " must hold KEY: VALUE lines, got a list"),
        ("_base_: 3", ":1: _base_ must be a file name or a list of them, got 3"),
        ("_base_: [a, 1]", ":1: _base_ must be a file name or a list of them"),
        ("_base_:", ":1: _base_ must be a file name or a list of them, got None"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, expected):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    assert message(path).startswith(f"{path}{expected}")


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("optim.lrr=1", "unknown key optim.lrr; did you mean optim.lr?"),
        ("optm.lr=1", "unknown key optm; did you mean optim?"),
        ("lr=1", "unknown key lr; did you mean optim.lr?"),
        ("window=1", "unknown key window; did you mean eval.window?"),
        ("zzz=1", "unknown key zzz; known: data, model, loss, optim, schedule, train, eval, "),
        ("train.zzz=1", "unknown key train.zzz; see `segtrain config schema`"),
        ("model.Decoder=linear", "unknown key model.Decoder; did you mean model.decoder?"),
        ("optim.lr.x=1", "optim.lr is a value, it has no key x"),
        ("optim.lr=", "optim.lr has no value; write optim.lr=null for none"),
        ("optim.lr", "'optim.lr' is no override; write KEY=VALUE: optim.lr=..."),
        ("optim.lr=fast", 'optim.lr must be a number, got "fast"'),
        ("optim.lr=true", "optim.lr must be a number, got true"),
        ("optim.lr=.inf", "optim.lr must be a finite number, got Infinity"),
        ("optim.lr=0", "optim.lr must be above 0, got 0"),
        ("optim.lr=null", "optim.lr must be a number, got nothing"),
        ("optim=3", "optim must be a section of KEY: VALUE lines, got 3"),
        ("optim.betas=[0.5]", "optim.betas must be a list of 2, got [0.5]"),
        ("optim.betas=[0.5, 1]", "optim.betas.1 must be below 1, got 1"),
        ("train.iters=5.0", "train.iters must be a whole number, got 5.0; write 5"),
        ("train.iters=5.5", "train.iters must be a whole number, got 5.5"),
        ("train.iters=0", "train.iters must be at least 1, got 0"),
        ("train.sync_bn=3", "train.sync_bn must be auto or true or false, got 3"),
        ("train.compile=no", 'train.compile must be true or false, got "no"'),
        ("data.root=5", 'data.root must be a text, got 5; write "5" in quotes'),
        ("data.root=''", 'data.root must be a text that is not empty, got ""'),
        ("data.flip=2", "data.flip must be at most 1, got 2"),
        ("data.crop=[1, 2, 3]", "data.crop must be a list of 2, got [1, 2, 3]"),
        ("data.crop=[]", "data.crop must be a list of 2, got []"),
        ("data.crop=512", "data.crop must be a list in [ ], got 512; write [512, ...]"),
        ("eval.ratios=[]", "eval.ratios must be a list of at least 1, got []"),
        ("model.name=segmentor", "did you mean segmenter?"),
        ("model.variant=X", 'model.variant must be Ti, S, B or L, got "X"'),
        ("data.dataset=cityscape", "did you mean cityscapes?"),
        ("data.folder={classes: 3}", "data.folder.classes must be a list in [ ] or a text, got 3"),
        (
            "data.folder={mapping: {a: 1}}",
            "the key a of data.folder.mapping must be a whole number",
        ),
        ("data.folder={mapping: {1: 256}}", "data.folder.mapping.1 must be at most 255, got 256"),
        ("data.folder={palette: {a: [1]}}", "data.folder.palette.a must be a list of 3, got [1]"),
        ("train.micro_batch=3", "train: micro_batch 3 must divide global_batch 8"),
        ("train.seed=!!int 3", "a YAML tag is refused"),
        ("data.crop=[1, 2", "is not valid YAML"),
    ],
)
def test_wrong_overrides(run, override, text):
    said = message(run, override)
    assert said.startswith("command line: ")
    assert text in said
    assert "\n" not in said


def test_wrong_files_name_the_line_of_the_file_that_holds_the_key(tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump(SMALL) + "loss:\n  knd: ce\n")
    top = tmp_path / "top.yaml"
    top.write_text("_base_: base.yaml\n\noptim:\n  lr: fast\n")
    line = len(base.read_text().splitlines())
    first, *rest = message(top).split("\n")
    assert first == f"{top}: 2 problems"
    assert set(rest) == {
        f"  {base}:{line}: unknown key loss.knd; did you mean loss.kind?",
        f'  {top}:4: optim.lr must be a number, got "fast"',
    }


def test_missing_keys_and_sections(tmp_path):
    content = small()
    del content["train"]
    del content["optim"]["lr"]
    path = write(tmp_path / "x.yaml", content)
    text = message(path)
    assert "the key optim.lr is missing; add it" in text
    assert f"  {path}: the section train is missing; add it" in text


def test_long_values_are_cut(run):
    said = message(run, f"optim.lr={'x' * 500}")
    assert len(said) < 200
    assert said.endswith("...")


def test_yaml_written_is_read_back_equal(tmp_path, run):
    folder = {"palette": {"no": [1, 2, 3], "1e3": [4, 5, 6]}, "classes": ["no", "1e3"]}
    content = small(data__dataset="folder", data__folder=folder, train__seed=7, init="0x1")
    config = RunConfig.model_validate(content)
    path = tmp_path / "again.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(path) == config


@settings(deadline=None, max_examples=30)
@given(
    st.builds(
        lambda root, lr, crop, mapping: small(
            data__root=root,
            data__crop=list(crop),
            data__dataset="folder",
            data__folder={"mapping": mapping},
            optim__lr=lr,
        ),
        st.text(min_size=1, max_size=8),
        st.floats(min_value=1e-12, max_value=1e12),
        st.tuples(st.integers(16, 9999), st.integers(16, 9999)),
        st.dictionaries(st.integers(0, 65535), st.integers(0, 255), max_size=3),
    )
)
def test_any_values_survive_yaml(content):
    config = RunConfig.model_validate(content)
    again = read_document(dump_yaml(config), source="x").content
    assert RunConfig.model_validate(again) == config


def test_schema_knows_the_keys_and_requires_none():
    schema = json.loads(json.dumps(json_schema()))
    assert list(schema["properties"])[:3] == ["_base_", "data", "model"]
    assert schema["additionalProperties"] is False
    optim = schema["$defs"]["OptimConfig"]
    assert optim["properties"]["lr"]["description"].startswith("Learning rate")
    assert not any("required" in part for part in (schema, *schema["$defs"].values()))


def test_diff(run):
    a = load_config(run)
    assert diff(a, a) == []
    b = load_config(run, ["optim.lr=1", "data.crop=[32, 32]", "data.dataset=folder"])
    c = load_config(run, ["data.dataset=folder", "data.folder={mapping: {3: 1}}"])
    assert diff(a, b) == [
        ("data.dataset", "camvid", "folder"),
        ("data.crop", [64, 96], [32, 32]),
        ("optim.lr", 0.001, 1.0),
    ]
    changed = {key: (left, right) for key, left, right in diff(a, c)}
    assert changed["data.folder.mapping"] == (None, {3: 1})


NETWORK = {"name": "network", "backbone": {"name": "resnet"}, "head": {"name": "context"}}


def test_another_model_takes_nothing_from_the_model_of_the_base(tmp_path):
    write(tmp_path / "base.yaml", small(model__dropout=0.3))
    own = write(tmp_path / "own.yaml", {"_base_": "base.yaml", "model": NETWORK})
    config = load_config(own, ["model.backbone.depth=18"])
    assert (config.model.name, config.model.backbone.depth) == ("network", 18)
    same = {"_base_": "base.yaml", "model": {"name": "segmenter", "patch_size": 8}}
    assert load_config(write(tmp_path / "same.yaml", same)).model.dropout == 0.3


def test_the_name_of_what_has_no_alternative_keeps_its_neighbours(run):
    config = load_config(run, ["optim.weight_decay=0.5", "optim.name=adamw"])
    assert config.optim.weight_decay == 0.5


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (NETWORK | {"variant": "Ti"}, "model named network has no key variant, only backbone, "),
        (NETWORK | {"axu": None}, "unknown key model.axu; did you mean model.aux?"),
        ({"variant": "Ti"}, "the key model.name is missing; add one of segmenter, network"),
        (
            {"name": "segmentr"},
            'model.name must be segmenter or network, got "segmentr"; did you mean segmenter?',
        ),
        (NETWORK | {"backbone": {"name": "resnet", "depth": 51}}, "model.backbone.depth must be "),
        ({"name": "network", "head": {"name": "context"}}, "section model.backbone is missing"),
    ],
)
def test_alternative_sections_are_told_apart(tmp_path, model, text):
    assert text in message(write(tmp_path / "run.yaml", SMALL | {"model": model}))


def test_a_network_survives_yaml(tmp_path):
    config = load_config(write(tmp_path / "run.yaml", SMALL | {"model": NETWORK}))
    (tmp_path / "again.yaml").write_text(dump_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config
