"""Checks on a YAML file and its `_BASE_` files before Detectron2 merges them."""

import os
from collections.abc import Iterator
from typing import Any

import yaml
from detectron2.utils.file_io import PathManager

from d2ctx.errors import UserError

BASE_KEY = "_BASE_"


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
    tree = {path: _read_plain_yaml(path, within=within)}
    for base in _bases(path, tree[path]):
        tree.update(read_yaml_tree(base, within=(*within, path)))
    return tree


def _read_plain_yaml(path: str, *, within: tuple[str, ...]) -> dict[str, Any]:
    if not PathManager.isfile(path):
        asked = f"{BASE_KEY} of {within[-1]}" if within else "configuration file"
        raise UserError(f"{asked}: {path} does not exist; check the path")
    with PathManager.open(path, "r") as file:
        text = file.read()
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_nodes(path, root)
        content = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UserError(f"{path} is not valid YAML: {place}{error.problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        came = "nothing" if content is None else type(content).__name__
        raise UserError(f"{path} must hold KEY: VALUE lines, got {came}")
    return content


def _check_nodes(path: str, root: yaml.Node | None) -> None:
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
        if isinstance(node, yaml.MappingNode):
            waiting.extend(part for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            waiting.extend(node.value)


def _bases(path: str, content: dict[str, Any]) -> list[str]:
    """The files that `content` names as `_BASE_`, found as fvcore finds them."""
    named = content.get(BASE_KEY, [])
    bases = [os.path.expanduser(base) for base in (named if isinstance(named, list) else [named])]
    return [base if "://" in base else os.path.join(os.path.dirname(path), base) for base in bases]
