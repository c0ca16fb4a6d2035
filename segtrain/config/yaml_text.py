"""YAML text -> plain values, each with the line it stands on; nothing else YAML can do.

The scalars are those of YAML 1.2, so that `1e-3` is a number and `no` is a text. Tags are refused,
because they can run code, and aliases only as long as they do not blow the document up.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml

from segtrain.errors import UserError

MAX_BYTES = 1 << 20
_MAX_NODES = 20_000  # of a document whose aliases are written out
_MAX_TOKENS = 80_000  # as many a document of so many nodes can have
_MAX_DEPTH = 50
_PREFIX = "tag:yaml.org,2002:"
Path = tuple[str | int, ...]


_OPENING = (
    yaml.BlockMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.FlowSequenceStartToken,
)
_CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[Any, Any] = {}  # those of YAML 1.1 are not inherited


def add_scalars(processor: type[yaml.resolver.BaseResolver]) -> None:
    """Teach a loader or a dumper of PyYAML which plain texts are no texts."""
    for name, (pattern, _) in _SCALARS.items():
        processor.add_implicit_resolver(_PREFIX + name, re.compile(f"(?:{pattern})$"), None)


_SCALARS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "null": (r"~|null|Null|NULL|", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "int": (r"[-+]?[0-9]+(?:_[0-9]+)*", int),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)"
        r"|\.(?:nan|NaN|NAN)",
        lambda text: float(re.sub(r"\.(?=[in])", "", text.lower())),
    ),
}
add_scalars(_Loader)


@dataclass(frozen=True)
class Document:
    """What a YAML text says.

    Args:
        content: Plain values.
        places: Path of a key or an entry -> where it stands, as "file:line".
    """

    content: Any
    places: dict[Path, str] = field(default_factory=dict)


def read_document(text: bytes | str, *, source: str) -> Document:
    """Read a YAML text.

    Args:
        text: YAML; bytes may be UTF-8 or UTF-16.
        source: Name of the text in messages.

    Returns:
        Its values and where they stand.

    Raises:
        UserError: On broken YAML (with line and column), a tag, a directive, a key that is twice
            there or neither text nor number, and on what is too large or too deep.
    """
    if len(text) > MAX_BYTES:
        raise UserError(f"{source}: more than {MAX_BYTES} bytes are too many for a configuration")
    try:
        _check_tokens(text, source)
        root = yaml.compose(text, Loader=_Loader)
        if root is None:
            return Document(None)
        _refuse_bombs(root, source)
        document = Document(None)
        return Document(_plain(root, (), document.places, source), document.places)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UserError(f"{source} is not valid YAML: {place}{error.problem}") from error
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise UserError(f"{source} is not valid YAML: {said}") from error


def _check_tokens(text: bytes | str, source: str) -> None:
    """Refuse tags, directives and depth before anything recurses into them."""
    depth = 0
    for number, token in enumerate(yaml.scan(text, Loader=_Loader)):
        if number > _MAX_TOKENS:
            raise UserError(f"{source} holds too many values for a configuration; shorten it")
        depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
        if depth > _MAX_DEPTH:
            raise UserError(f"{source} is nested too deeply for a configuration")
        if isinstance(token, yaml.TagToken | yaml.DirectiveToken):
            line = token.start_mark.line + 1
            kind = "tag" if isinstance(token, yaml.TagToken) else "directive"
            raise UserError(
                f"{source}:{line}: a YAML {kind} is refused, it could run code; "
                "write the plain value"
            )


def _refuse_bombs(root: yaml.Node, source: str) -> None:
    """Count the nodes as if every alias were written out, each node looked at once."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            if sizes[id(node)] < 0:
                line = node.start_mark.line + 1
                raise UserError(f"{source}:{line}: an alias leads back to what holds it; remove it")
            return sizes[id(node)]
        sizes[id(node)] = -1
        sizes[id(node)] = 1 + sum(size(child) for child in _children(node))
        return sizes[id(node)]

    if (total := size(root)) > _MAX_NODES:
        raise UserError(f"{source}: its aliases stand for {total} values; write fewer of them")


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _plain(node: yaml.Node, path: Path, places: dict[Path, str], source: str) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_plain(part, (*path, k), places, source) for k, part in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return _scalar(node, source)
    content: dict[str | int, Any] = {}
    for key_node, value_node in node.value:
        place = f"{source}:{key_node.start_mark.line + 1}"
        key = _scalar(key_node, source) if isinstance(key_node, yaml.ScalarNode) else None
        if isinstance(key, bool) or not isinstance(key, str | int):
            raise UserError(f"{place}: a key must be a text or a whole number; write it in quotes")
        if key in content:
            raise UserError(
                f"{place}: the key {key} stands twice in one section, the first would be lost; "
                "join the two"
            )
        if key == "<<":
            raise UserError(f"{place}: << is not supported; name a file as _base_ instead")
        places[(*path, key)] = place
        content[key] = _plain(value_node, (*path, key), places, source)
    return content


def _scalar(node: yaml.Node, source: str) -> Any:
    name = node.tag.removeprefix(_PREFIX)
    try:
        return _SCALARS[name][1](node.value) if name in _SCALARS else node.value
    except ValueError as error:  # Python reads no number of thousands of digits
        line = node.start_mark.line + 1
        raise UserError(
            f"{source}:{line}: a number of {len(node.value)} digits; shorten it"
        ) from error
