import math

import pytest

from segtrain.config.yaml_text import read_document
from segtrain.errors import UserError


def content(text):
    return read_document(text, source="f.yaml").content


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("-1.5E+2", -150.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("160_000", 160000),
        ("010", 10),
        ("-3", -3),
        ("true", True),
        ("False", False),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ('"1e-3"', "1e-3"),
        ("~", None),
        ("null", None),
        ("", None),
        ("# nothing", None),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("=", "="),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    assert content(text) == value
    assert type(content(text)) is type(value)


def test_nan():
    assert math.isnan(content(".nan"))


def test_places_are_lines_of_keys_at_every_depth():
    text = "a:\n  b: 1\n  c: [x, {d: 2}]\n# more\n1: 3\n"
    document = read_document(text, source="f.yaml")
    assert document.content == {"a": {"b": 1, "c": ["x", {"d": 2}]}, 1: 3}
    assert document.places == {
        ("a",): "f.yaml:1",
        ("a", "b"): "f.yaml:2",
        ("a", "c"): "f.yaml:3",
        ("a", "c", 1, "d"): "f.yaml:3",
        (1,): "f.yaml:5",
    }


def test_an_alias_repeats_its_anchor():
    assert content("a: &size [4, 5]\nb: *size") == {"a": [4, 5], "b": [4, 5]}


def test_bytes_with_a_mark_of_their_encoding():
    assert content("a: é".encode("utf-8-sig")) == {"a": "é"}
    assert content("a: é".encode("utf-16")) == {"a": "é"}


def bomb(levels, width=9):
    lines = ["l0: &l0 [x]"]
    lines += [f"l{k}: &l{k} [{', '.join([f'*l{k - 1}'] * width)}]" for k in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2", "f.yaml is not valid YAML: line 1, column 9: "),
        ("a: 1\n\tb: 2", "f.yaml is not valid YAML: line 2, column 1: "),
        ("a: 1\n---\nb: 2", "f.yaml is not valid YAML: line 2, column 1: but found another"),
        (b"a: \xff\xfe\x00\x00", "f.yaml is not valid YAML: "),
        ("a: *b", "undefined alias"),
        ("a: !!python/object/apply:os.system ['true']", "f.yaml:1: a YAML tag is refused"),
        ("\na: !!str 1", "f.yaml:2: a YAML tag is refused, it could run code; write the plain"),
        ("%YAML 1.1\n---\na: 1", "f.yaml:1: a YAML directive is refused"),
        ("a: 1\nb: 2\na: 3", "f.yaml:3: the key a stands twice in one section, the first would"),
        ("x:\n  a: 1\n  a: 1", "f.yaml:3: the key a stands twice"),
        ("1: 1\n01: 2", "f.yaml:2: the key 1 stands twice"),
        ("true: 1", "f.yaml:1: a key must be a text or a whole number; write it in quotes"),
        ("1.5: 1", "f.yaml:1: a key must be a text or a whole number"),
        ("? [1, 2]\n: 3", "f.yaml:1: a key must be a text or a whole number"),
        ("a: &a {x: 1}\nb: {<<: *a}", "f.yaml:2: << is not supported; name a file as _base_"),
        ("a: &a [*a]", "f.yaml:1: an alias leads back to what holds it; remove it"),
        (bomb(8), "f.yaml: its aliases stand for "),
        ("[" * 20000, "f.yaml is nested too deeply for a configuration"),
        ("a: " + "x" * (1 << 20), "bytes are too many for a configuration"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(UserError) as caught:
        read_document(text, source="f.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_aliases_below_the_limit_are_allowed():
    assert len(content(bomb(4))["l3"]) == 9
