"""Counting of cases, a fence around what they write, and a bound of the memory they take."""

import os
import resource
import sys
from pathlib import Path

import pytest
from PIL import Image

from .contract import CASES

# Bytes that the tests of a module may add to the process: the largest picture that Pillow decodes,
# in RGB, with a copy, and some room.
_MOST_GROWTH = 2 * 3 * 2 * (Image.MAX_IMAGE_PIXELS or 0) + (1 << 28)
_UNIT = 1 if sys.platform == "darwin" else 1024


def pytest_collection_modifyitems(items):
    """The count comes after everything that is counted."""
    items.sort(key=lambda item: item.path.name == "test_zz_count.py")


def pytest_terminal_summary(terminalreporter):
    if CASES:
        parts = ", ".join(f"{count} {what}" for what, count in sorted(CASES.items()))
        terminalreporter.write_line(f"hostile input: {sum(CASES.values())} cases ({parts})")


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """A folder whose files every case writes anew."""
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(autouse=True, scope="module")
def _bounded_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * _UNIT
    assert grown < _MOST_GROWTH, f"{grown / 2**20:.0f} MiB more than before"


@pytest.fixture
def fence(tmp_path):
    """A folder that a command may write into; whatever else appears beside it is an error."""
    inside = tmp_path / "outer" / "inside"
    inside.mkdir(parents=True)
    before = set(_files(tmp_path))
    yield inside
    beyond = [f for f in set(_files(tmp_path)) - before if not f.is_relative_to(inside)]
    assert not beyond, f"written outside of its folder: {beyond}"


def _files(folder: Path) -> list[Path]:
    return [Path(place, name) for place, _, names in os.walk(folder) for name in names]
