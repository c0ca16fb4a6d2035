"""One of two processes that dies: the other names it and ends, and the run goes on as it would."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.segtrain.two_processes import free_port
from tests.stress.forks import ROOT, Run
from tests.stress.kills import Trainer, assert_same_run, check_after_kill

pytestmark = pytest.mark.timeout(1800)  # a minute or two on an idle machine

_LONG = 600.0  # seconds: far more than the others need to find out, on a busy machine
_MORE = ("train.iters=40", "train.checkpoint_every=10", "train.eval_every=20")


@pytest.fixture
def trainer(trainer):
    trainer.keys = (*trainer.keys, *_MORE)
    return trainer


def two(trainer: Trainer, run: Path) -> list[Run]:
    """Both processes, as `torchrun` starts them."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        trainer.go_on(run, ("environment", {**shared, "RANK": str(k), "LOCAL_RANK": str(k)}))
        for k in range(2)
    ]


def finish(trainer: Trainer, run: Path) -> Path:
    for process in two(trainer, run):
        assert process.wait(_LONG) == 0, process.said()
    return run


def until(path: Path, processes: list[Run]) -> None:
    """Wait for a file that both write before they end."""
    end = time.monotonic() + _LONG
    while not path.exists():
        assert time.monotonic() < end
        assert not any(process.ended() for process in processes), processes[0].said()
        time.sleep(0.002)


@pytest.mark.stress
@pytest.mark.parametrize("victim", [1, 0])
def test_a_process_that_is_killed_is_named_by_the_other(trainer, tmp_path, victim):
    straight, run = finish(trainer, tmp_path / "straight"), tmp_path / "run"
    processes = two(trainer, run)
    until(run / "checkpoints/last.safetensors", processes)
    processes[victim].kill()
    survivor = processes[1 - victim]
    assert survivor.wait(_LONG) == 2, survivor.said()
    said = survivor.said().splitlines()[-1]
    assert said.startswith(f"segtrain: error: process {victim} ended before the run did"), said
    assert "Traceback" not in survivor.said()
    check_after_kill(run)
    assert_same_run(finish(trainer, run), straight)


def torchrun(trainer: Trainer, run: Path) -> subprocess.Popen[str]:
    """The real launcher, in a group of processes of its own."""
    resuming = trainer.has_checkpoint(run)
    config = ("--config", str(ROOT / "configs/seg" / trainer.config), *trainer.keys)
    command = ["resume", str(run)] if resuming else ["train", *config, f"output={run}"]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [sys.executable, *launcher, f"--master-port={free_port()}", "-m", "segtrain", *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ranks_of(launcher: int) -> dict[int, int]:
    """Processes of a launcher, by rank."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(place.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            variables = place.joinpath("environ").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if parent == launcher:
            ranks = [int(v[5:]) for v in variables if re.fullmatch(rb"RANK=\d+", v)]
            found.update({rank: int(place.name) for rank in ranks})
    return found


@pytest.mark.stress
def test_a_process_that_is_killed_under_torchrun(trainer, tmp_path):
    trainer.keys = (*trainer.keys, "train.iters=400")
    straight, run = finish(trainer, tmp_path / "straight"), tmp_path / "run"
    launcher = torchrun(trainer, run)
    try:
        end = time.monotonic() + _LONG
        while not (run / "checkpoints/last.safetensors").exists():
            assert launcher.poll() is None, launcher.communicate()[0]
            assert time.monotonic() < end
            time.sleep(0.002)
        os.kill(ranks_of(launcher.pid)[1], signal.SIGKILL)
        said, _ = launcher.communicate(timeout=_LONG)
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
    assert launcher.returncode == 1
    assert "segtrain: error: process 1 ended before the run did, so all do;" in said
    assert re.search(r"rank\s*: 1 ", said)  # torchrun's own summary
    launcher = torchrun(trainer, run)
    said, _ = launcher.communicate(timeout=2 * _LONG)
    assert launcher.returncode == 0, said
    assert_same_run(run, straight)
