"""docs/compatibility.md lists what is used from Detectron2: exactly, and as public or not."""

import ast
import importlib
import re

import pytest

from tests.contracts.source_tree import ROOT, files, tree

COMPAT = ROOT / "d2ctx" / "compat.py"
# The installer looks whether Detectron2 can be imported at all.
PROBE = ROOT / "d2ctx" / "install"
DOC = (ROOT / "docs" / "compatibility.md").read_text()
THE_MODULE = "the module"
Names = set[tuple[str, str]]
# Detectron2 computes the `__all__` of this package before it imports what the package is for.
UNLISTED = "detectron2.engine"


def imported(*, in_compat: bool) -> Names:
    """(module, name) of all imports from Detectron2 and fvcore."""
    found: Names = set()
    paths = [COMPAT] if in_compat else [p for p in files("d2ctx") if p != COMPAT]
    for path in paths:
        for node in [] if PROBE in path.parents else ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom):
                found |= {(node.module or "", alias.name) for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {(alias.name, THE_MODULE) for alias in node.names}
    return {(module, n) for module, n in found if module.split(".")[0] in ("detectron2", "fvcore")}


def listed(title: str) -> Names:
    """(module, name) of the table below a title of the page."""
    section = DOC.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `([\w.]+)` \| (.+) \|$", section, re.MULTILINE)
    assert rows
    return {(m, n) for m, names in rows for n in re.findall(r"`(\w+)`", names) or [THE_MODULE]}


def difference(found: Names, page: Names) -> str:
    return f"add to the page: {sorted(found - page)}; take away: {sorted(page - found)}"


PUBLIC, HIDDEN = "Public names in use", "Names that Detectron2 does not export"


def test_the_page_lists_every_public_name_and_no_other():
    found, page = imported(in_compat=False), listed(PUBLIC)
    assert found == page, difference(found, page)


def test_the_page_lists_what_compat_imports():
    found, page = imported(in_compat=True), listed(HIDDEN)
    assert found == page, difference(found, page)


@pytest.mark.parametrize(("module", "name"), sorted(listed(PUBLIC) | listed(HIDDEN)))
def test_listed_names_exist_and_public_ones_are_exported(module, name):
    loaded = importlib.import_module(module)
    if name == THE_MODULE:
        return
    if not hasattr(loaded, name):
        importlib.import_module(f"{module}.{name}")
    exported = getattr(loaded, "__all__", None)
    if (module, name) in listed(PUBLIC) and exported is not None and module != UNLISTED:
        assert name in exported
    assert not name.startswith("_")


def test_every_overridden_or_called_method_exists():
    section = DOC.split("## Methods that we override", 1)[1].split("\n## ", 1)[0]
    names = {name: module for module, name in listed(PUBLIC)}
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", section, re.MULTILINE)
    assert len(rows) >= 7
    for name, text in rows:
        owner = getattr(importlib.import_module(names[name]), name)
        methods = text.split("; read:")[0].split("and its parts")[0]
        for method in re.findall(r"`(\w+)`", methods):
            assert hasattr(owner, method), f"{name}.{method}"
