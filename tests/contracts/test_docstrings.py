"""A documented argument exists, and an existing argument of a public callable is documented."""

import ast
import re

import pytest

from tests.contracts.source_tree import PACKAGES, files, tree

ENTRY = re.compile(r"^\s{4}(\*{0,2}\w+): ")


def documented_arguments(doc: str) -> list[str]:
    section = re.search(r"^Args:\n((?:[ ]{4}.*\n?|\n)+)", doc, re.MULTILINE)
    lines = section.group(1).splitlines() if section else []
    return [m.group(1).lstrip("*") for m in map(ENTRY.match, lines) if m]


def arguments(node: ast.FunctionDef) -> list[str]:
    spec = node.args
    ordered = [*spec.posonlyargs, *spec.args, spec.vararg, *spec.kwonlyargs, spec.kwarg]
    return [a.arg for a in ordered if a and a.arg not in ("self", "cls", "mcs")]


def callables(module: ast.Module):
    """(name, docstring, arguments) of every function and of every class with its constructor."""
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef) and node.name != "__init__":
            yield node.name, ast.get_docstring(node), arguments(node)
        elif isinstance(node, ast.ClassDef):
            init = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
            yield node.name, ast.get_docstring(node), arguments(init[0]) if init else None


@pytest.mark.parametrize("package", PACKAGES)
def test_documented_arguments_match_the_signature(package):
    for path in files(package):
        for name, doc, expected in callables(tree(path)):
            told = documented_arguments(doc or "")
            if told and expected is not None:
                assert told == expected, f"{path}: {name} documents {told}, takes {expected}"


def test_reader_of_docstrings_sees_arguments():
    doc = "Do.\n\nArgs:\n    a: One,\n        more: words.\n    *b: Two.\n\nReturns:\n    c: Three."
    assert documented_arguments(doc) == ["a", "b"]
