"""The keys that a configuration may have, found by walking the sections of the schema."""

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from segtrain.config.base import Section
from segtrain.config.schema import RunConfig


def sections_in(annotation: Any) -> list[type[Section]]:
    """The section classes in the type of a field."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for part in get_args(annotation) for found in sections_in(part)]


def sections_at(path: tuple[str | int, ...]) -> list[type[Section]]:
    """The section classes that may stand at a path; none where a value stands."""
    found: list[type[Section]] = [RunConfig]
    for part in path:
        fields = [section.model_fields.get(str(part)) for section in found]
        found = [s for f in fields if f is not None for s in sections_in(f.annotation)]
    return found


def chosen(sections: Sequence[type[Section]], node: Any) -> list[type[Section]]:
    """Of alternative sections, those that the `name` of what stands there means; else all."""
    name = node.get("name") if isinstance(node, dict) else None
    named = [s for s in sections if name in get_args(_type_of_name(s))]
    return named if len(sections) > 1 and named else list(sections)


def _type_of_name(section: type[Section]) -> Any:
    field = section.model_fields.get("name")
    return field.annotation if field else None


def keys_at(path: tuple[str | int, ...]) -> list[str]:
    """The keys of the section at a path."""
    return list(dict.fromkeys(key for s in sections_at(path) for key in s.model_fields))


def all_keys(path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all keys, sections included, in the order of the schema."""
    for key in keys_at(path):
        yield (*path, key)
        yield from all_keys((*path, key))
