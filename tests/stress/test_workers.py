"""Data workers that die, or find a broken image, and workers that outlive their trainer."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.stress.forks import Run
from tests.stress.kills import Trainer, assert_same_run

pytestmark = pytest.mark.timeout(1800)  # a minute or two on an idle machine

_LONG = 600.0  # seconds: far more than anything here takes, on a busy machine as well


@pytest.fixture
def trainer(trainer, tmp_path, scenes):
    """With two workers, many updates, and images of its own."""
    shutil.copytree(scenes, tmp_path / "scenes")
    more = (f"data.root={tmp_path}/scenes", "data.workers=2", "train.iters=60")
    trainer.keys = (*trainer.keys, *more, "train.checkpoint_every=10", "train.eval_every=null")
    return trainer


def workers_of(process: int) -> list[int]:
    """Processes that it has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[1]) == process and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def until(condition, run: Run) -> None:
    """Wait for something that must come before the run ends."""
    end = time.monotonic() + _LONG
    while not condition():
        assert time.monotonic() < end, run.said()
        assert not run.ended(), run.said()
        time.sleep(0.002)


def begun(trainer: Trainer, folder: Path, *faults) -> Run:
    """A run in the middle of its updates."""
    run = trainer.go_on(folder, *faults)
    until((folder / "checkpoints/last.safetensors").exists, run)
    return run


@pytest.mark.stress
def test_a_worker_that_is_killed(trainer, tmp_path):
    straight = trainer.finish(tmp_path / "straight")
    for number, text in ((signal.SIGKILL, "Killed"), (signal.SIGBUS, "Bus error")):
        folder = tmp_path / f"run_{number}"
        run = begun(trainer, folder)
        os.kill(workers_of(run.pid)[0], number)
        assert run.wait(_LONG) == 2, run.said()
        said = run.said().splitlines()[-1].lstrip("\0")  # of the dying worker
        assert said.startswith("segtrain: error: DataLoader worker (pid"), run.said()
        assert f"is killed by signal: {text}" in said or "exited unexpectedly" in said
        assert "write fewer data.workers, or 0 to load in the trainer itself" in said
        assert f"go on with: segtrain resume {folder}" in said
        assert_same_run(trainer.finish(folder), straight)


@pytest.mark.stress
def test_an_image_that_breaks_while_training(trainer, tmp_path):
    straight, folder = trainer.finish(tmp_path / "straight"), tmp_path / "run"
    run = begun(trainer, folder)
    image = sorted((tmp_path / "scenes/images/train").iterdir())[4]
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])
    assert run.wait(_LONG) == 2, run.said()
    said = run.said().splitlines()[-1]
    assert said.startswith(f"segtrain: error: cannot read {image}: "), run.said()
    image.write_bytes(content)
    assert_same_run(trainer.finish(folder), straight)


@pytest.mark.stress
def test_workers_of_a_killed_trainer_hold_no_lock_and_end(trainer, tmp_path):
    straight, folder = trainer.finish(tmp_path / "straight"), tmp_path / "run"
    run = begun(trainer, folder)
    workers = workers_of(run.pid)
    assert len(workers) == 2
    os.kill(run.pid, signal.SIGSTOP)  # so that they cannot be told
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait() == -9
    assert_same_run(trainer.finish(folder), straight)
    end = time.monotonic() + _LONG
    for worker in workers:
        os.kill(worker, signal.SIGCONT)
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < end, "workers live on without their trainer"
        time.sleep(0.05)


def test_a_trainer_that_fails_ends_though_it_has_workers(trainer, tmp_path):
    """An error that is shown as it is, such as that of a GPU without memory."""
    run = trainer.go_on(tmp_path / "run", ("fail_in_update", {"number": 3}))
    assert run.wait(_LONG) == 1, run.said()
    assert "MemoryError: injected" in run.said().splitlines()[-1]
