"""Configurations of Detectron2's runs: YAML that attacks, bases that loop, wrong values."""

import json
from pathlib import Path

import pytest
from detectron2.config import get_cfg
from hypothesis import given
from hypothesis import strategies as st

from d2ctx import train_net
from d2ctx.config import add_d2ctx_config, load_config
from d2ctx.config_file import all_keys, get_value, merge_config
from d2ctx.datasets import parse_definition
from d2ctx.errors import UserError
from d2ctx.yaml_tree import read_yaml_tree
from tests.d2ctx.launch import restored_loggers
from tests.d2ctx.toy_coco import restored_catalogs

from .contract import CASES, SCALE, generated, outcome
from .strategies import JSON, YAML_VALUES
from .test_configs import ATTACKS

PLAIN = get_cfg()
add_d2ctx_config(PLAIN)
KEYS = sorted(key for key in all_keys(PLAIN) if not isinstance(get_value(PLAIN, key), dict))
CHUNK = 25  # keys of one test


def merged(path: Path, *, names=()) -> str:
    """The refusal of a file."""
    with restored_catalogs():
        return outcome(
            lambda: merge_config(PLAIN.clone(), config_file=str(path), opts=[]),
            error=UserError,
            names=[path, *names],
            what="configurations of detectron2",
        )[1]


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# ---- YAML ------------------------------------------------------------------------------------
@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_refused_at_once(place, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert merged(write(place / "attack.yaml", ATTACKS[name]))
    assert not list(tmp_path.iterdir())


@given(text=st.binary(max_size=60) | st.text(max_size=60))
@generated(120)
def test_any_text_is_read_or_refused(place, text):
    path = write(
        place / "a.yaml", text if isinstance(text, bytes) else text.encode("utf-8", "replace")
    )
    outcome(
        lambda: read_yaml_tree(str(path)),
        error=UserError,
        names=[path],
        what="configurations of detectron2",
    )


@pytest.mark.parametrize("first", range(0, len(KEYS), CHUNK))
def test_every_key_with_a_wrong_value(place, first):
    for number, key in enumerate(KEYS[first : first + CHUNK], start=first):
        for step in range(SCALE):
            value = YAML_VALUES[(number * 7 + step) % len(YAML_VALUES)]
            *sections, leaf = key.split(".")
            lines = [f"{'  ' * depth}{section}:" for depth, section in enumerate(sections)]
            text = "\n".join([*lines, f"{'  ' * len(sections)}{leaf}: {value}"])
            merged(write(place / "key.yaml", text), names=[leaf])


@given(key=st.sampled_from(KEYS), value=st.sampled_from(YAML_VALUES) | st.text(max_size=12))
@generated(100)
def test_every_key_on_the_command_line(key, value):
    outcome(
        lambda: merge_config(PLAIN.clone(), config_file=None, opts=[key, value]),
        error=UserError,
        names=[key, "command line"],
        what="configurations of detectron2",
    )


# ---- bases -----------------------------------------------------------------------------------
@pytest.mark.timeout(60)
def test_towers_of_bases_are_refused(tmp_path):
    for number in range(60):  # read blindly, 2^60 files
        left, right = f"l{number + 1}.yaml", f"r{number + 1}.yaml"
        for side in "lr":
            write(tmp_path / f"{side}{number}.yaml", f"_BASE_: [{left}, {right}]\n")
    assert "stand on each other" in merged(tmp_path / "l0.yaml", names=[tmp_path])


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "base",
    [
        *(
            "missing.yaml",
            ".",
            "/",
            "itself.yaml",
            "/dev/null",
            "/dev/zero",
            "loop.yaml",
            "x" * 300,
        ),
        *([1], {"a": 1}, 5, "", "\0", None, [None], ["itself.yaml"], ["b.yaml", "b.yaml"]),
    ],
    ids=lambda base: str(base)[:20],
)
def test_bases_that_cannot_be_are_refused(tmp_path, base):
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    write(tmp_path / "b.yaml", "VERSION: 2\n")
    path = write(tmp_path / "itself.yaml", json.dumps({"_BASE_": base, "VERSION": 2}))
    assert merged(path, names=[base])


# ---- data sets and the command ---------------------------------------------------------------
@given(entry=JSON, key=st.sampled_from([None, "JSON", "IMAGES", "SEM_SEG", "X"]))
@generated(80)
def test_definitions_of_any_form(entry, key):
    if key is not None:
        entry = {"JSON": "a.json", "IMAGES": "images", key: entry}
    outcome(
        lambda: parse_definition("mine", entry),
        error=UserError,
        names=["DATASETS.COCO_FORMAT.mine"],
        what="configurations of detectron2",
    )


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "name",
    ["bomb of lists", "bomb of sections", "deep lists", "circle", "python", "latin", "digits"],
)
def test_the_command_says_one_line(place, name, capsys):
    path = write(place / "attack.yaml", ATTACKS[name])
    CASES["commands"] += 1
    with restored_catalogs(), restored_loggers():
        assert train_net.main(["--config-file", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert str(path) in said


def test_a_plain_file_loads(place):
    CASES["commands"] += 1
    path = write(place / "plain.yaml", "SOLVER: {MAX_ITER: 7, STEPS: &a [3]}\n")
    assert load_config(str(path), []).SOLVER.MAX_ITER == 7
