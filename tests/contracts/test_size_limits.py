"""Files, functions and nesting stay small enough to read."""

import ast

import pytest

from tests.contracts.source_tree import PACKAGES, files, tree

MAX_FILE, MAX_FUNCTION, MAX_CONSTRUCTOR, MAX_NESTING = 400, 60, 80, 3
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def code_lines(node) -> int:
    """Lines of a function without its docstring, which may be as long as it must."""
    first = node.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    doc = first.end_lineno - first.lineno + 1 if documented else 0
    return node.end_lineno - node.lineno + 1 - doc


def nesting(node, depth: int = 0) -> int:
    deepest = depth
    for field, child in ast.iter_fields(node):
        for part in child if isinstance(child, list) else [child]:
            if isinstance(part, ast.AST) and not isinstance(part, FUNCTIONS):
                chained = (
                    field == "orelse" and isinstance(part, ast.If) and isinstance(node, ast.If)
                )
                deeper = depth + (isinstance(part, BLOCKS) and not chained)
                deepest = max(deepest, nesting(part, deeper))
    return deepest


@pytest.mark.parametrize("package", PACKAGES)
def test_files_are_short(package):
    for path in files(package):
        assert len(path.read_text().splitlines()) <= MAX_FILE, path


@pytest.mark.parametrize("package", PACKAGES)
def test_functions_are_short_and_flat(package):
    for path in files(package):
        for node in ast.walk(tree(path)):
            if isinstance(node, FUNCTIONS):
                constructor = node.name == "__init__" or node.name.startswith("build_")
                limit = MAX_CONSTRUCTOR if constructor else MAX_FUNCTION
                assert code_lines(node) <= limit, f"{path}:{node.lineno} {node.name}"
                assert nesting(node) <= MAX_NESTING, f"{path}:{node.lineno} {node.name}"


def test_nesting_counts_blocks_but_not_elif_chains():
    code = "def f():\n for a in b:\n  if a:\n   pass\n  elif b:\n   pass\n  elif c:\n   pass"
    assert nesting(ast.parse(code).body[0]) == 2
