"""Runs of segtrain that are killed without a word, at random moments and at every single one."""

import random
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from tests.stress.kills import Killer, Trainer, assert_same_run, check_after_kill

_SMALL = (
    *("data.crop=[32,32]", "data.base_size=[32,32]", "schedule.warmup_iters=2"),
    *("train.global_batch=2", "train.log_every=1"),
)
# Together they have all that a checkpoint holds: random paths, an average, norms with buffers, the
# files of several checkpoints, data workers.
CASES = {
    "segmenter": (
        "segmenter/seg_tiny_instant.yaml",
        *("model.drop_path_rate=0.2", "data.workers=0", "train.keep=2"),
        *("train.iters=36", "train.checkpoint_every=3", "train.eval_every=6"),
    ),
    "mlp": (
        "mlp/mlp_instant.yaml",
        *("data.workers=1", "train.ema_decay=0.9"),
        *("train.global_batch=4", "train.micro_batch=2"),
        *("train.iters=12", "train.checkpoint_every=2", "train.eval_every=3"),
    ),
    "short": (
        "segmenter/seg_tiny_instant.yaml",
        *("model.embed_dim=24", "model.depth=1", "model.drop_path_rate=0.2", "data.workers=0"),
        *("train.keep=2", "train.iters=6", "train.checkpoint_every=2", "train.eval_every=3"),
    ),
}
# Changes of files in the run "short" with which a run once could not go on, or not as before: no
# checkpoint in their folder, weights without a state, a state without weights, an evaluation in the
# journal alone.
FEW = (19, 30, 33, 44)
_WITHOUT_WEIGHTS = 52


@pytest.fixture
def trainer(request, forks, scenes, tmp_path):
    config, *keys = CASES[request.param]
    keys = (f"data.root={scenes}", *_SMALL, *keys)
    return Trainer(forks, config, keys, tmp_path)


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


def killed_at(trainer: Trainer, run: Path, number: int) -> bool:
    """Go on with a run that ends right before it changes a file for the n-th time."""
    code = trainer.go_on(run, ("end_at_event", {"folder": str(run), "number": number})).wait()
    assert code in (0, -9), code
    if code:
        check_after_kill(run)
    return code != 0


def at_every_change(trainer: Trainer, straight: Path, begin: Callable[[Path], None]) -> int:
    """How many changes there are."""
    for number in count(1):
        run = trainer.folder / f"change_{number}"
        begin(run)
        if not killed_at(trainer, run, number):
            return number - 1
        assert_same_run(trainer.finish(run), straight)
    raise AssertionError


@pytest.mark.parametrize("trainer", ["short"], indirect=True)
def test_kills_at_some_changes_of_a_file(trainer, tmp_path):
    straight = trainer.finish(tmp_path / "straight")
    for number in FEW:
        run = tmp_path / f"change_{number}"
        assert killed_at(trainer, run, number)
        assert_same_run(trainer.finish(run), straight)


@pytest.mark.stress
@pytest.mark.parametrize("trainer", ["short"], indirect=True)
def test_a_kill_at_every_change_of_a_file(trainer, tmp_path, capsys):
    straight = trainer.finish(tmp_path / "straight")
    changes = at_every_change(trainer, straight, lambda run: None)
    with capsys.disabled():
        print(f"\n{changes} changes of files, a kill before each of them")
    assert changes > 60


@pytest.mark.stress
@pytest.mark.parametrize("trainer", ["short"], indirect=True)
def test_a_kill_at_every_change_while_going_on(trainer, tmp_path, capsys):
    """From a checkpoint without its weights, whose journal is ahead of it."""
    straight = trainer.finish(tmp_path / "straight")
    half = tmp_path / "half"
    assert killed_at(trainer, half, _WITHOUT_WEIGHTS)
    assert not (half / "checkpoints/last.safetensors").exists()
    changes = at_every_change(trainer, straight, lambda run: shutil.copytree(half, run))
    with capsys.disabled():
        print(f"\n{changes} changes of files after a kill, a second one before each of them")
    assert changes > 20
