"""What pydantic finds wrong -> lines that name the place, what was expected, what came, the fix."""

import json
from collections.abc import Callable, Mapping
from typing import Any, get_args

from pydantic import ValidationError

from segtrain.config.keys import all_keys, chosen, keys_at, sections_at
from segtrain.wording import close_to, did_you_mean

Path = tuple[str | int, ...]
_WIDEST = 60  # characters of a value that a message repeats

# Kind of error -> what was expected, from the context of the error.
_EXPECTED: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "bool_type": lambda ctx: "true or false",
    "dict_type": lambda ctx: "a section of KEY: VALUE lines",
    "finite_number": lambda ctx: "a finite number",
    "float_type": lambda ctx: "a number",
    "greater_than": lambda ctx: f"above {ctx['gt']:g}",
    "greater_than_equal": lambda ctx: f"at least {ctx['ge']:g}",
    "int_type": lambda ctx: "a whole number",
    "less_than": lambda ctx: f"below {ctx['lt']:g}",
    "less_than_equal": lambda ctx: f"at most {ctx['le']:g}",
    "literal_error": lambda ctx: str(ctx["expected"]).replace("'", ""),
    "model_type": lambda ctx: "a section of KEY: VALUE lines",
    "string_too_short": lambda ctx: "a text that is not empty",
    "string_type": lambda ctx: "a text",
    "too_long": lambda ctx: f"a list of {ctx['max_length']}",
    "too_short": lambda ctx: f"a list of at least {ctx['min_length']}",
    "tuple_type": lambda ctx: "a list in [ ]",
}


def explain(
    error: ValidationError, *, content: Mapping[str, Any], places: Mapping[Path, str], source: str
) -> list[str]:
    """Explain everything that is wrong with a configuration.

    Args:
        error: What pydantic found.
        content: What it looked at.
        places: Path -> where it stands, as "file:line".
        source: Where it stands when no place is known.

    Returns:
        A line for each problem.
    """
    groups: dict[Path, list[dict[str, Any]]] = {}
    for found in error.errors(include_url=False):
        groups.setdefault(_path_in(content, found["loc"]), []).append(dict(found))
    lines = []
    for path, group in groups.items():
        place = _place(path, places) or source
        lines += [f"{place}: {text}" for text in _texts(path, group, content)]
    return lines


def _path_in(content: Any, loc: tuple[str | int, ...]) -> Path:
    """The path of an error without the names that pydantic gives to alternatives."""
    path: list[str | int] = []
    node = content
    for position, part in enumerate(loc):
        here = isinstance(node, dict) and part in node
        here = here or (isinstance(node, list) and isinstance(part, int) and part < len(node))
        if here:
            node = node[part]
            path.append(part)
        elif position == len(loc) - 1 and part in keys_at(tuple(path)):
            path.append(part)  # a key that is missing; a missing entry is its list's error
    return tuple(path)


def _texts(path: Path, group: list[dict[str, Any]], content: Mapping[str, Any]) -> list[str]:
    kinds = {found["type"] for found in group}
    name = ".".join(str(part) for part in path)
    if "value_error" in kinds:
        said = [line for found in group for line in str(found["ctx"]["error"]).split("\n")]
        return [f"{name}: {text}" if name else text for text in said]
    if "extra_forbidden" in kinds:
        return [_misplaced(path, content) or unknown_key(path)]
    if kinds <= {"union_tag_invalid", "union_tag_not_found"}:
        return [_no_such_alternative(name, group[0], _value_at(content, path))]
    value = _value_at(content, path)
    if kinds == {"missing"} and value is None:
        what = "section" if sections_at(path) else "key"
        return [f"the {what} {name} is missing; add it"]
    if kinds == {"missing"}:
        group = group[-1:]  # the last entry tells the length
    expected = [_expected(found) for found in group]
    if all(found["loc"][-1] == "[key]" for found in group):
        name = f"the key {path[-1]} of {'.'.join(str(part) for part in path[:-1])}"
        return [f"{name} must be {' or '.join(expected)}"]
    fix = _fix(kinds, group, value)
    return [f"{name} must be {' or '.join(dict.fromkeys(expected))}, got {_shown(value)}{fix}"]


def _misplaced(path: Path, content: Mapping[str, Any]) -> str | None:
    """Say of a key of an alternative section that another one was chosen."""
    *parents, key = path
    node = _value_at(content, tuple(parents))
    sections = sections_at(tuple(parents))
    owners = [s for s in sections if key in s.model_fields]
    if not owners or owners == sections:
        return None
    place = ".".join(str(part) for part in parents)
    known = [name for s in chosen(sections, node) for name in s.model_fields if name != "name"]
    return f"{place} named {node['name']} has no key {key}, only {', '.join(known)}; remove it"


def _no_such_alternative(name: str, found: Mapping[str, Any], value: Any) -> str:
    """Say which names a section may have."""
    sections = sections_at(tuple(name.split(".")))
    known = [n for s in sections for n in get_args(s.model_fields["name"].annotation)]
    if found["type"] == "union_tag_not_found":
        return f"the key {name}.name is missing; add one of {', '.join(known)}"
    near = close_to(str(value["name"]), known)
    fix = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"{name}.name must be {' or '.join(known)}, got {_shown(value['name'])}{fix}"


def _expected(found: Mapping[str, Any]) -> str:
    if found["type"] == "missing":  # an entry of a list of fixed length
        return f"a list of {found['loc'][-1] + 1}"
    write = _EXPECTED.get(found["type"])
    return write(found.get("ctx", {})) if write else str(found["msg"])


def _fix(kinds: set[str], group: list[dict[str, Any]], value: Any) -> str:
    if "literal_error" in kinds and isinstance(value, str):
        known = str(group[0]["ctx"]["expected"]).replace("' or '", "', '").strip("'").split("', '")
        if close := close_to(value, known):
            return f"; did you mean {' or '.join(close)}?"
    if kinds == {"string_type"} and isinstance(value, int | float):
        return f'; write "{value}" in quotes'
    if kinds == {"int_type"} and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if "tuple_type" in kinds and not isinstance(value, dict):
        return f"; write [{_shown(value)}, ...]"
    return ""


def unknown_key(path: Path) -> str:
    """Say that a key is unknown and which is meant.

    Args:
        path: The key.

    Returns:
        The text, with the nearest key of the section or the same key in another section.
    """
    *section, key = _shortest_unknown(tuple(str(part) for part in path))
    siblings = keys_at(tuple(section))
    if not siblings:
        return f"{'.'.join(section)} is a value, it has no key {key}"
    text = f"unknown key {'.'.join((*section, key))}"
    if close_to(key, siblings):
        near = [".".join((*section, name)) for name in close_to(key, siblings)]
        return f"{text}; did you mean {' or '.join(near)}?"
    elsewhere = [".".join(known) for known in all_keys() if known[-1] == key]
    if elsewhere:
        return f"{text}; did you mean {' or '.join(elsewhere)}?"
    return f"{text}; {did_you_mean(key, siblings) or 'see `segtrain config schema`'}"


def _shortest_unknown(path: tuple[str, ...]) -> tuple[str, ...]:
    """The start of a path up to the first part that is not known."""
    for length in range(1, len(path)):
        if path[length - 1] not in keys_at(path[: length - 1]):
            return path[:length]
    return path


def _place(path: Path, places: Mapping[Path, str]) -> str | None:
    for length in range(len(path), 0, -1):
        if path[:length] in places:
            return places[path[:length]]
    return None


def _value_at(content: Any, path: Path) -> Any:
    for part in path:
        if isinstance(content, dict):
            content = content.get(part)
        elif isinstance(content, list) and isinstance(part, int) and part < len(content):
            content = content[part]
        else:
            return None
    return content


def _shown(value: Any) -> str:
    if value in ({}, None):
        return "nothing"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 3]}..."
