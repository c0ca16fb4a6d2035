"""What the documentation tells a user to run or read exists and works."""

import re

import pytest

from tests.contracts.source_tree import ROOT

PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    + list((ROOT / "docs").glob("*.md"))
    + list((ROOT / "projects").rglob("*.md"))
    + list((ROOT / "benchmarks").glob("*.md"))
)
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_python_snippet_runs(snippet):
    exec(compile(snippet, "README.md", "exec"), {})


def test_there_are_snippets():
    assert len(SNIPPETS) == 2


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_named_exist(page):
    text = page.read_text()
    names = re.findall(
        r"\b(?:configs|docs|ctxops|d2ctx|segtrain|projects|tests)/[\w./-]+\.\w+", text
    )
    links = [
        str((page.parent / link).resolve().relative_to(ROOT))
        for link in re.findall(r"\]\(([^)#:]+)\)", text)
    ]
    absent = [name for name in names + links if not (ROOT / name).exists()]
    assert not absent


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_and_make_targets_exist(page):
    text = page.read_text()
    makefile = (ROOT / "Makefile").read_text()
    for module in re.findall(r"python -m ((?:d2ctx|segtrain|benchmarks)[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    for line in re.findall(r"^ +make ([a-z ]+?)(?: *#.*)?$", text, re.MULTILINE):
        for target in line.split():
            assert re.search(rf"^{target}\b.*:", makefile, re.MULTILINE), target


def test_the_gate_runs_the_readmes_test_command():
    assert "make test" in README
    assert "make test" in (ROOT / ".ci" / "run").read_text()
