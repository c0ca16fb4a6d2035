"""What the fault tests share: the program imported once, and a few scenes."""

import pytest

from segtrain.cli import main
from tests.stress.forks import Forks
from tests.stress.kills import COMMAND

# Imported once for all runs; what is missing here is imported by each of them.
_MODULES = (
    "segtrain.config.commands",
    "segtrain.train.parts",
    "segtrain.evaluation.evaluate",
    "torch._dynamo",
)


@pytest.fixture(scope="package")
def forks():
    with Forks(COMMAND, *_MODULES) as started:
        yield started


@pytest.fixture(scope="package")
def scenes(tmp_path_factory):
    """Twelve synthetic scenes of 32 pixels."""
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    size = ["--num", "12", "--size", "32", "--seed", "1"]
    assert main(["data", "synth", "--out", str(folder), "--format", "folder", *size]) == 0
    return folder
