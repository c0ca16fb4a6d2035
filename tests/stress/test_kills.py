"""Runs of segtrain that are killed without a word, at random moments and at every single one."""

import random
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from tests.stress.kills import Killer, Trainer, assert_same_run, check_after_kill

pytestmark = pytest.mark.timeout(1800)  # a minute or two on an idle machine

# Changes of files at which a run once could not go on, or not as before: a folder for checkpoints
# without any, weights without a state, a state without weights at its end, an evaluation in the
# journal alone. With each, for which time.
FEW = (
    ("open checkpoints/last.pt.*", 1),
    ("os.rename checkpoints/last.pt", 3),
    ("open checkpoints/last.safetensors.*", 7),
    ("os.rename results.json.*", 1),
)


@pytest.mark.stress
@pytest.mark.parametrize(
    ("trainer", "kills"), [("segmenter", 50), ("mlp", 20)], indirect=["trainer"]
)
def test_random_kills(trainer, kills, tmp_path, capsys):
    straight = trainer.finish(tmp_path / "straight")
    killer = Killer(trainer, random.Random(0))
    runs = killer.kill(kills)
    with capsys.disabled():
        print(f"\n{killer.figures()}")
    assert killer.kills == kills
    for run in runs:
        assert_same_run(run, straight)
    assert {"start", "step", "save"} <= killer.where.keys()


def killed_at(trainer: Trainer, run: Path, **which: object) -> bool:
    """Go on with a run that ends right before it changes a file; False where it never did."""
    code = trainer.go_on(run, ("end_at_change", {"folder": str(run), **which})).wait()
    assert code in (0, -9), code
    if code:
        check_after_kill(run)
    return code != 0


def at_every_change(trainer: Trainer, straight: Path, begin: Callable[[Path], None]) -> int:
    """How many changes there are."""
    for number in count(1):
        run = trainer.folder / f"change_{number}"
        begin(run)
        if not killed_at(trainer, run, number=number):
            return number - 1
        assert_same_run(trainer.finish(run), straight)
    raise AssertionError


def test_kills_at_some_changes_of_a_file(trainer, tmp_path):
    straight = trainer.finish(tmp_path / "straight")
    for place, (what, number) in enumerate(FEW):
        run = tmp_path / f"change_{place}"
        assert killed_at(trainer, run, what=what, number=number)
        assert_same_run(trainer.finish(run), straight)


@pytest.mark.stress
def test_a_kill_at_every_change_of_a_file(trainer, tmp_path, capsys):
    straight = trainer.finish(tmp_path / "straight")
    changes = at_every_change(trainer, straight, lambda run: None)
    with capsys.disabled():
        print(f"\n{changes} changes of files, a kill before each of them")
    assert changes > 60


@pytest.mark.stress
def test_a_kill_at_every_change_while_going_on(trainer, tmp_path, capsys):
    """From a checkpoint without its weights, whose journal is ahead of it."""
    straight = trainer.finish(tmp_path / "straight")
    half = tmp_path / "half"
    assert killed_at(trainer, half, what="os.remove checkpoints/step_*")
    assert not (half / "checkpoints/last.safetensors").exists()
    changes = at_every_change(trainer, straight, lambda run: shutil.copytree(half, run))
    with capsys.disabled():
        print(f"\n{changes} changes of files after a kill, a second one before each of them")
    assert changes > 20
