"""Configurations of segtrain: every key with wrong values, YAML that attacks, bases that loop."""

import json
from functools import cache
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from segtrain.cli import main
from segtrain.config.keys import all_keys
from segtrain.config.load import dump_yaml, load_config
from segtrain.config.yaml_text import read_document
from segtrain.errors import UserError
from tests.segtrain.config_files import small

from .contract import CASES, SCALE, generated, outcome
from .strategies import YAML_VALUES

CONFIGS = Path(__file__).parents[2] / "configs" / "seg"
# Together these have every section of the schema.
SHIPPED = sorted(CONFIGS.rglob("*.yaml"))
KEYS = sorted(set(all_keys()))
# Of every key, so many of the values; a larger scale tries all of them.
_EACH = min(3 * SCALE, len(YAML_VALUES))


def loaded(path: Path, *overrides: str, names=(), what: str = "configurations"):
    """A configuration that can be written and read again, or a refusal."""
    config, problem = outcome(
        lambda: load_config(path, overrides), error=UserError, names=[path, *names], what=what
    )
    if config is not None:
        again = path.with_name("again.yaml")
        again.write_text(dump_yaml(config), encoding="utf-8", errors="surrogatepass")
        assert load_config(again) == config
    return config, problem


def write(path: Path, content: dict | str | bytes) -> Path:
    if isinstance(content, dict):
        content = yaml.safe_dump(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


# ---- every key -------------------------------------------------------------------------------
def with_value(keys: tuple[str, ...], value: str) -> str:
    """A configuration as text in which one key has a value of text."""
    mark = "VALUE-HERE"
    content = small()
    if keys[0] == "model" and len(keys) > 1:
        content["model"] = model_with(keys)
    node = content
    for key in keys[:-1]:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            return ""
    node[keys[-1]] = mark
    return yaml.safe_dump(content, sort_keys=False).replace(mark, value)


@cache
def shipped_models() -> list[dict]:
    texts = {path.read_text() for path in SHIPPED}
    models = [yaml.load(text, yaml.CSafeLoader).get("model", {}) for text in sorted(texts)]
    return list({json.dumps(model): model for model in models}.values())


def model_with(keys: tuple[str, ...]) -> dict:
    """The model of a shipped configuration that sets the key, else a Segmenter."""
    for content in shipped_models():
        node = content
        for key in keys[1:-1]:
            node = node.get(key) if isinstance(node, dict) else None
        if isinstance(node, dict) and keys[-1] in node:
            return json.loads(json.dumps(content))
    return small()["model"]


@pytest.mark.parametrize("key", KEYS, ids=".".join)
def test_every_key_with_wrong_values(place, key):
    path = place / "key.yaml"
    first = KEYS.index(key) * 7
    for number in range(_EACH):
        value = YAML_VALUES[(first + number * 11) % len(YAML_VALUES)]
        text = with_value(key, value)
        if text:
            loaded(write(path, text), names=[key[-1]])


@pytest.mark.parametrize("key", KEYS, ids=".".join)
def test_every_key_on_the_command_line(place, key):
    path = write(place / "plain.yaml", small())
    first = KEYS.index(key) * 5
    for number in range(_EACH // 3):
        value = YAML_VALUES[(first + number * 17) % len(YAML_VALUES)]
        name = ".".join(key)
        loaded(path, f"{name}={value}", names=[key[-1], "command line"])


@given(text=st.text(max_size=30))
@generated(100)
def test_overrides_of_any_text(place, text):
    path = write(place / "plain.yaml", small())
    loaded(path, text, names=["command line"])


# ---- YAML ------------------------------------------------------------------------------------
def read(text: bytes | str):
    return outcome(
        lambda: read_document(text, source="a.yaml"),
        error=UserError,
        names=["a.yaml"],
        what="yaml",
    )


@given(text=st.binary(max_size=60) | st.text(max_size=60))
@generated(150)
def test_any_text_is_read_or_refused(text):
    read(text)


@given(
    parts=st.lists(
        st.sampled_from(
            [*"[]{}:,-?&*!|>'\"%@`#~ \n", "\n  ", ": ", "- ", "a", "1", "&a", "*a", "!!x", "---\n"]
        ),
        max_size=25,
    )
)
@generated(250)
def test_any_signs_of_yaml_are_read_or_refused(parts):
    read("".join(parts))


@given(
    start=st.floats(0, 1),
    length=st.integers(0, 30),
    middle=st.text(alphabet="[]{}:,-&*!|>\"'# \n\t0a\x00\ud7ff", max_size=6),
)
@generated(120)
def test_damaged_configurations_load_or_are_refused(place, start, length, middle):
    text = yaml.safe_dump(small())
    cut = int(start * len(text))
    path = write(place / "damaged.yaml", text[:cut] + middle + text[cut + length :])
    lines = {line.partition(":")[0].strip() for line in text.splitlines()}
    loaded(path, names=lines)


def bomb(levels: int, *, mapping: bool) -> str:
    """Each level names the one before ten times."""
    lines = ["a0: &a0 [1]"]
    for level in range(1, levels):
        names = [f"*a{level - 1}"] * 10
        inner = (
            ", ".join(f"k{k}: {n}" for k, n in enumerate(names)) if mapping else ", ".join(names)
        )
        lines.append(f"a{level}: &a{level} " + (f"{{{inner}}}" if mapping else f"[{inner}]"))
    return "\n".join(lines)


ATTACKS = {
    "bomb of lists": bomb(30, mapping=False),
    "bomb of sections": bomb(30, mapping=True),
    "deep lists": "[" * 100_000,
    "deep sections": "{a: " * 100_000,
    "deep blocks": "".join(" " * k + "a:\n" for k in range(1000)),
    "deep dashes": "- " * 50_000,
    "deep questions": "? " * 50_000,
    "circle": "a: &a [*a]",
    "circle of sections": "a: &a {b: *a}",
    "chain": "\n".join(["a0: &a0 [1]", *(f"a{k}: &a{k} [*a{k - 1}]" for k in range(1, 3000))]),
    "python": "a: !!python/object/apply:os.system ['touch SENTINEL']",
    "python module": "a: !!python/module:os",
    "python name": "!!python/name:os.system",
    "binary": "a: !!binary aGVsbG8=",
    "own tag": "a: !mine {b: 1}",
    "directive": "%TAG ! tag:yaml.org,2002:python/\n---\na: !name:os.system x",
    "two documents": "a: 1\n---\nb: 2",
    "twice": "data: {}\ndata: {}",
    "twice deep": "data: {crop: [1, 2], crop: [3, 4]}",
    "merge": "a: &a {b: 1}\nc: {<<: *a}",
    "key of a list": "[1, 2]: 3",
    "key of a section": "{a: 1}: 3",
    "many": "[" + "1," * 400_000 + "]",
    "long": "a: " + "x" * (1 << 21),
    "nul": "a: \0",
    "latin": b"a: \xe9",
    "wide": "a: 1".encode("utf-32"),
    "digits": "a: " + "9" * 5000,
    "nothing": "",
    "comment": "# nothing",
    "list": "- 1",
    "text": "text",
    "number": "5",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_refused_at_once(place, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(place / "attack.yaml", ATTACKS[name])
    config, problem = loaded(path)
    assert config is None
    assert problem.count("\n") == 0 or "problems" in problem
    assert not list(tmp_path.iterdir())


# ---- bases -----------------------------------------------------------------------------------
def test_a_deep_tower_of_bases_is_refused(tmp_path):
    for number in range(400):
        write(tmp_path / f"{number}.yaml", f"_base_: {number + 1}.yaml\n")
    write(tmp_path / "400.yaml", small())
    _, problem = loaded(tmp_path / "0.yaml")
    assert "stand on each other" in problem


@pytest.mark.timeout(30)
def test_bases_that_name_each_other_often_are_read_once(tmp_path):
    for number in range(18):
        write(tmp_path / f"{number}.yaml", f"_base_: [{number + 1}.yaml, {number + 1}.yaml]\n")
    write(tmp_path / "18.yaml", small())
    config, _ = loaded(tmp_path / "0.yaml")
    assert config.train.iters == 100


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "base",
    [
        *("missing.yaml", ".", "..", "/", "itself.yaml", "../outer/itself.yaml", "/dev/null"),
        *("/dev/zero", "loop.yaml", "x" * 300, "a/b/c.yaml", "~", "~nobody/x.yaml", "http://x/y"),
        *([1], {"a": 1}, [["a"]], 5, "", "\0", None, [None]),
    ],
    ids=lambda base: str(base)[:20],
)
def test_bases_that_cannot_be_are_refused(tmp_path, base):
    folder = tmp_path / "outer"
    folder.mkdir()
    (folder / "loop.yaml").symlink_to(folder / "loop.yaml")
    path = write(folder / "itself.yaml", {"_base_": base, **small()})
    config, problem = loaded(path, names=[base])
    assert config is None
    assert problem.count("\n") == 0


# ---- the command -----------------------------------------------------------------------------
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "name", ["bomb of lists", "deep blocks", "python", "latin", "digits", "list"]
)
def test_commands_say_one_line(place, name, capsys):
    path = write(place / "attack.yaml", ATTACKS[name])
    for command in (["config", "show"], ["data", "check"], ["analyze", "--config"]):
        CASES["commands"] += 1
        assert main([*command, str(path)]) == 2
        said = capsys.readouterr()
        assert said.err.startswith("segtrain: error: ")
        assert said.err.count("\n") == 1
        assert str(path) in said.err
        assert not said.out


def test_a_folder_is_no_configuration(place, capsys):
    CASES["commands"] += 1
    assert main(["config", "show", str(place)]) == 2
    assert f"{place} cannot be read" in capsys.readouterr().err
