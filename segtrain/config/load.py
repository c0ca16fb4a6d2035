"""YAML files and `key=value` overrides -> `RunConfig`; and back to YAML, to JSON schema, to a diff.

A file may name others as `_base_`, relative to itself: a text, or a list of which the later win.
What the file says goes over what its bases say, key by key inside the sections of the schema. Where
it names another model, backbone or head, nothing of that section of its bases remains.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from segtrain.config.keys import sections_at
from segtrain.config.messages import explain, unknown_key
from segtrain.config.schema import RunConfig
from segtrain.config.yaml_text import MAX_BYTES, Document, add_scalars, read_document
from segtrain.errors import UserError
from segtrain.wording import plural

BASE_KEY = "_base_"
_COMMAND_LINE = "command line"
_MOST_BASES = 20  # files one above the other

_Known = dict[str, Document]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration.

    Args:
        path: YAML file.
        overrides: "key=value" each, the key with dots and the value as YAML; the last one wins.

    Returns:
        The checked configuration, all defaults filled in.

    Raises:
        UserError: On a file that is missing or no plain YAML, a circle of `_base_`, an unknown key
            (with the nearest one), a value of the wrong type or range, sections that contradict
            each other, or an override that is no "key=value". It names file and line.
    """
    path = Path(path)
    document = _read_with_bases(path, known={})
    for override in overrides:
        document = _merged(document, _override(override))
    content = {"output": f"output/{path.stem}", **document.content}
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        lines = explain(error, content=content, places=document.places, source=str(path))
    if len(lines) > 1:
        lines = [f"{path}: {plural(len(lines), 'problem')}", *(f"  {line}" for line in lines)]
    raise UserError("\n".join(lines))


def _read_with_bases(path: Path, within: tuple[Path, ...] = (), *, known: _Known) -> Document:
    place = os.path.realpath(path)
    if place in known:  # files that name each other many times are read once all the same
        return known[place]
    if any(place == os.path.realpath(outer) for outer in within):
        circle = " -> ".join(str(file) for file in (*within, path))
        raise UserError(f"{within[0]}: {BASE_KEY} goes in a circle: {circle}; remove one of them")
    if len(within) > _MOST_BASES:
        raise UserError(f"{within[0]}: over {_MOST_BASES} files stand on each other; join some")
    own = read_document(_bytes_of(path, within), source=str(path))
    if not isinstance(own.content, dict):
        came = "nothing" if own.content is None else f"a {type(own.content).__name__}"
        raise UserError(f"{path} must hold KEY: VALUE lines, got {came}")
    document = Document({})
    for base in _bases(own, path):
        below = _read_with_bases(path.parent / base, (*within, path), known=known)
        document = _merged(document, below)
    known[place] = _merged(document, own)
    return known[place]


def _bytes_of(path: Path, within: tuple[Path, ...]) -> bytes:
    asked = f"{BASE_KEY} of {within[-1]}: " if within else ""
    try:
        with path.open("rb") as file:  # a device may have no end
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise UserError(f"{asked}{path} does not exist; check the path") from error
    except OSError as error:
        raise UserError(f"{asked}{path} cannot be read: {error.strerror}") from error


def _bases(document: Document, path: Path) -> list[str]:
    """Take `_base_` out of a document."""
    named = document.content.pop(BASE_KEY, [])
    bases = [named] if isinstance(named, str) else named
    if not isinstance(bases, list) or not all(_is_path(base) for base in bases):
        place = document.places.get((BASE_KEY,), str(path))
        raise UserError(
            f"{place}: {BASE_KEY} must be a file name or a list of them, got {named!r:.80}"
        )
    return bases


def _is_path(base: Any) -> bool:
    return isinstance(base, str) and "\0" not in base


def _merged(base: Document, over: Document) -> Document:
    content = _merge(base.content, over.content, ())
    return Document(content, {**base.places, **over.places})


def _merge(base: Any, over: Any, path: tuple[str, ...]) -> Any:
    # A dict outside the sections, such as a palette, is one value.
    if not (isinstance(base, dict) and isinstance(over, dict) and sections_at(path)):
        return over
    merged = {} if _is_another(base, over, path) else dict(base)
    for key, value in over.items():
        merged[key] = _merge(merged.get(key), value, (*path, str(key)))
    return merged


def _is_another(base: Mapping[str, Any], over: Mapping[str, Any], path: tuple[str, ...]) -> bool:
    """Whether an alternative section takes the place of another, whose keys mean nothing to it."""
    alternatives = len(sections_at(path)) > 1
    return alternatives and "name" in over and over["name"] != base.get("name")


def _override(text: str) -> Document:
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"{_COMMAND_LINE}: {text!r} is no override; write KEY=VALUE: {text}=...")
    path = tuple(key.strip().split("."))
    if not value.strip():
        raise UserError(f"{_COMMAND_LINE}: {key} has no value; write {key}=null for none")
    for length in range(len(path)):
        if not sections_at(path[:length]) and path[length:]:
            raise UserError(f"{_COMMAND_LINE}: {unknown_key(path)}")
    content = read_document(value, source=f"{_COMMAND_LINE}: {key}").content
    for part in reversed(path):
        content = {part: content}
    return Document(content, {path[: k + 1]: _COMMAND_LINE for k in range(len(path))})


def dump_yaml(config: RunConfig) -> str:
    """Write a configuration as YAML that `load_config` reads back to an equal one.

    Args:
        config: A configuration.

    Returns:
        All keys, defaults included, in the order of the schema.
    """
    return yaml.dump(plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def plain(config: RunConfig) -> dict[str, Any]:
    """The sections as dicts and the tuples as lists, all keys included.

    Args:
        config: A configuration.

    Returns:
        What YAML can say and `RunConfig.model_validate` takes back.
    """
    return _without_tuples(config.model_dump())


def _without_tuples(value: Any) -> Any:
    if isinstance(value, dict):  # the numbers among its keys stay numbers
        return {key: _without_tuples(item) for key, item in value.items()}
    return [_without_tuples(item) for item in value] if isinstance(value, tuple) else value


class _Dumper(yaml.SafeDumper):
    """Lists of plain values on one line."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        plain = not any(isinstance(item, list | dict) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=plain)


add_scalars(_Dumper)  # quotes what `load_config` would not read back as a text


def json_schema() -> dict[str, Any]:
    """The JSON schema of a file, for editors and programs.

    Returns:
        The schema; no key is required, because a file may take any of them from its `_base_`.
    """
    schema = RunConfig.model_json_schema()
    for part in (schema, *schema.get("$defs", {}).values()):
        part.pop("required", None)
    schema["properties"] = {
        BASE_KEY: {
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
            "description": "File or files, relative to this one, that this one goes over.",
        },
        **schema["properties"],
    }
    return schema


def diff(a: RunConfig, b: RunConfig) -> list[tuple[str, Any, Any]]:
    """List what differs.

    Args:
        a: One configuration.
        b: Another.

    Returns:
        (key with dots, value in `a`, value in `b`), null where one has no such key.
    """
    left, right = (dict(_flat(plain(config))) for config in (a, b))
    keys = list(dict.fromkeys((*left, *right)))
    return [(k, left.get(k), right.get(k)) for k in keys if left.get(k) != right.get(k)]


def _flat(content: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict) and sections_at((*path, key)):
            yield from _flat(value, (*path, key))
        else:
            yield ".".join((*path, key)), value
