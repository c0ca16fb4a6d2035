"""Checks on a YAML file and its `_BASE_` files before Detectron2 merges them."""

import os
from collections.abc import Iterator
from typing import Any

import yaml
from detectron2.utils.file_io import PathManager

from d2ctx.errors import UserError

BASE_KEY = "_BASE_"
_MOST_BASES = 8  # files one above the other; Detectron2 reads those of many files many times
_MAX_CHARACTERS = 1 << 20
_MAX_NODES = 20_000  # of a file whose aliases are written out
_MAX_TOKENS = 80_000  # as many a file of so many nodes can have
_MAX_DEPTH = 50
_OPENING = (
    yaml.BlockMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.FlowSequenceStartToken,
)
_CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)


def read_yaml_tree(path: str, *, within: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """Read `path` and every file it is based on, allowing plain YAML only.

    Args:
        path: A configuration file.
        within: The files that led to it by `_BASE_`, outermost first.

    Returns:
        File name -> content, the outermost file first.

    Raises:
        UserError: On a missing file, broken YAML (with line and column), a tag that would run
            code, a key given twice, or a circle of `_BASE_`.
    """
    if path in within:
        raise UserError(f"{path}: {BASE_KEY} leads back to the file itself; remove one {BASE_KEY}")
    if len(within) > _MOST_BASES:
        raise UserError(f"{within[0]}: over {_MOST_BASES} files stand on each other; join some")
    tree = {path: _read_plain_yaml(path, within=within)}
    for base in _bases(path, tree[path]):
        tree.update(read_yaml_tree(base, within=(*within, path)))
    return tree


def _read_plain_yaml(path: str, *, within: tuple[str, ...]) -> dict[str, Any]:
    if not PathManager.isfile(path):
        asked = f"{BASE_KEY} of {within[-1]}" if within else "configuration file"
        raise UserError(f"{asked}: {path} does not exist; check the path")
    try:
        with PathManager.open(path, "r") as file:
            text = file.read(_MAX_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}; write it as UTF-8 text") from error
    if len(text) > _MAX_CHARACTERS:
        raise UserError(f"{path}: over {_MAX_CHARACTERS} characters are too many; shorten it")
    try:
        _check_tokens(path, text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_nodes(path, root)
        content = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UserError(f"{path} is not valid YAML: {place}{error.problem}") from error
    except UserError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # as a date in a 13th month
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        came = "nothing" if content is None else type(content).__name__
        raise UserError(f"{path} must hold KEY: VALUE lines, got {came}")
    return content


def _check_tokens(path: str, text: str) -> None:
    """Refuse depth and length before anything recurses into them."""
    depth = 0
    for number, token in enumerate(yaml.scan(text, Loader=yaml.SafeLoader)):
        depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
        if depth > _MAX_DEPTH or number > _MAX_TOKENS:
            what = "is nested too deeply" if depth > _MAX_DEPTH else "holds too many values"
            raise UserError(f"{path} {what} for a configuration; shorten it")


def _check_aliases(path: str, root: yaml.Node | None) -> None:
    """Count the nodes as if every alias were written out; Detectron2 writes them out."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if sizes.get(id(node)) == 0:
            line = node.start_mark.line + 1
            raise UserError(f"{path}, line {line}: an alias leads back to what holds it; remove it")
        if id(node) not in sizes:
            sizes[id(node)] = 0
            sizes[id(node)] = 1 + sum(size(part) for part in _parts(node))
        return sizes[id(node)]

    if root is not None and (total := size(root)) > _MAX_NODES:
        raise UserError(f"{path}: its aliases stand for {total} values; write fewer of them")


def _check_nodes(path: str, root: yaml.Node | None) -> None:
    _check_aliases(path, root)
    for node in _walk(root):
        place = f"{path}, line {node.start_mark.line + 1}"
        if node.tag.startswith("tag:yaml.org,2002:python"):
            tag = node.tag.removeprefix("tag:yaml.org,2002:")
            raise UserError(
                f"{place}: the tag !!{tag} is refused, it could run code; write a value"
            )
        if isinstance(node, yaml.MappingNode):
            _check_keys(place=path, node=node)


def _check_keys(*, place: str, node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        where = f"{place}, line {key.start_mark.line + 1}"
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        if key.tag != "tag:yaml.org,2002:str":
            raise UserError(f"{where}: the key {key.value!r} is no text; write it in quotes")
        if key.value in seen:
            raise UserError(
                f"{where}: the key {key.value} stands twice in one section, the first would be "
                "lost; join the two"
            )
        seen.add(key.value)


def _walk(root: yaml.Node | None) -> Iterator[yaml.Node]:
    """Every node once, aliases included."""
    waiting, seen = [root] if root else [], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        waiting.extend(_parts(node))


def _parts(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _bases(path: str, content: dict[str, Any]) -> list[str]:
    """The files that `content` names as `_BASE_`, found as fvcore finds them."""
    named = content.get(BASE_KEY, [])
    listed = named if isinstance(named, list) else [named]
    if not all(isinstance(base, str) and base for base in listed):
        raise UserError(f"{path}: {BASE_KEY} must be a file or a list of files, got {named!r:.80}")
    if len(set(listed)) < len(listed):
        raise UserError(f"{path}: {BASE_KEY} names a file twice; keep one of them")
    bases = [os.path.expanduser(base) for base in listed]
    return [base if "://" in base else os.path.join(os.path.dirname(path), base) for base in bases]
