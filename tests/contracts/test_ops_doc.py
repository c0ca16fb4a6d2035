"""docs/ops.md tells of every public operation, its examples run, and its table names the files."""

import importlib
import re

import pytest
import torch

import ctxops
from tests.contracts.source_tree import ROOT

TEXT = (ROOT / "docs" / "ops.md").read_text()
CHAPTERS = {
    chapter.splitlines()[0]: re.split(r"^### ", chapter, flags=re.MULTILINE)[1:]
    for chapter in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]
}
EXAMPLES = {
    section.splitlines()[0]: re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    for sections in CHAPTERS.values()
    for section in sections
}
# (chapter, or nothing for that of the row before; names; file).
ROWS = re.findall(r"^\| ([^|]*)\| (`[^|]+`) \| `(ctxops/[^`|]+)\.py` \|$", TEXT, re.MULTILINE)


def names_in(text: str) -> list[str]:
    return re.findall(r"`(\w+)`", text)


def test_every_public_name_has_one_section():
    told = [name for heading in EXAMPLES for name in names_in(heading)]
    assert sorted(told) == sorted(ctxops.__all__)


@pytest.mark.parametrize("heading", EXAMPLES)
def test_section_has_one_short_example_that_runs(heading):
    (example,) = EXAMPLES[heading]
    assert len(example.splitlines()) <= 8
    assert set(names_in(heading)) & set(re.findall(r"\w+", example))
    torch.manual_seed(0)
    exec(compile(example, f"docs/ops.md: {heading}", "exec"), {})


def test_every_section_has_an_equation_its_time_and_its_memory():
    for sections in CHAPTERS.values():
        for section in sections:
            heading, text = section.split("\n", 1)
            assert re.search(r"^    \S", text, re.MULTILINE), f"no equation: {heading}"
            assert re.search(r"\b[Tt]ime\b", text), f"no time: {heading}"
            assert re.search(r"\b[Kk]ept\b|\b[Mm]emory\b", text), f"no memory: {heading}"


def test_table_names_chapter_and_file_of_every_name():
    chapter, rows = "", {}
    for first, names, file in ROWS:
        chapter = first.strip() or chapter
        rows |= {name: (chapter, file) for name in names_in(names)}
    for chapter, sections in CHAPTERS.items():
        for name in (name for section in sections for name in names_in(section.split("\n", 1)[0])):
            assert rows[name][0] == chapter, name
            module = importlib.import_module(rows.pop(name)[1].replace("/", "."))
            assert getattr(ctxops, name).__module__ == module.__name__, name
    assert not rows
