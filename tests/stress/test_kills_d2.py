"""Runs of d2ctx that are killed without a word."""

import json
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from d2ctx import train_net
from tests.d2ctx.launch import write_launch
from tests.segtrain.test_train_resume import assert_equal_trees
from tests.stress.forks import Fault, Forks, Run
from tests.stress.kills import Killer, Trainer

pytestmark = [pytest.mark.stress, pytest.mark.timeout(1800)]

_LAST = "last_checkpoint"
_KEYS = (
    *("SOLVER.MAX_ITER", 8, "SOLVER.STEPS", "(6,)", "SOLVER.CHECKPOINT_PERIOD", 2, "SEED", 3),
    *("TEST.EVAL_PERIOD", 4, "DATALOADER.NUM_WORKERS", 1, "INPUT.MIN_SIZE_TRAIN", "(48, 56, 64)"),
)


@pytest.fixture(scope="module")
def forks():
    with Forks("d2ctx.train_net:main", "torch._dynamo", "faster_coco_eval") as started:
        yield started


@dataclass
class D2Trainer(Trainer):
    """The commands of d2ctx: one command starts a run and goes on with it."""

    phases = "tell_phase_d2"

    def has_checkpoint(self, run: Path) -> bool:
        return (run / _LAST).exists()

    def check(self, run: Path) -> None:
        check_after_kill(run)

    def go_on(self, run: Path, *faults: Fault) -> Run:
        arguments = ("--config-file", self.config, "--resume", *self.keys, "OUTPUT_DIR", run)
        return self.forks.start(*arguments, log=self.log(run), faults=faults)


class D2Killer(Killer):
    """Looks for unfinished checkpoints where they are: an evaluation's own folders come and go."""

    def at(self, target: str, phase: Path, started: Run) -> bool:
        if target == "partial":
            run = self.trainer.folder / f"killed_{self.rounds}"
            return any(run.glob("*.pt*.partial")) and not started.ended()
        return super().at(target, phase, started)


@pytest.fixture
def trainer(forks, tmp_path):
    launch = write_launch(tmp_path)
    return D2Trainer(forks, str(launch.config), _KEYS, tmp_path)


def check_after_kill(run: Path) -> None:
    """All checkpoints can be read, and the newest is named once there is one."""
    for path in run.glob("model_*.pth"):
        torch.load(path, weights_only=True)
    if (run / _LAST).exists():
        assert (run / (run / _LAST).read_text().strip()).is_file()
    if (run / "results.json").exists():
        json.loads((run / "results.json").read_text())


def journal(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "losses.jsonl").read_text().splitlines()]


def detections(run: Path) -> Any:
    return json.loads((run / "inference/toy_val/coco_instances_results.json").read_text())


def assert_same_run(run: Path, straight: Path) -> None:
    files = sorted(path.name for path in straight.glob("model_*"))
    assert sorted(path.name for path in run.glob("model_*")) == files
    for name in files:
        ours, theirs = (torch.load(folder / name, weights_only=True) for folder in (run, straight))
        assert_equal_trees(ours, theirs, name)
    assert (run / _LAST).read_text() == (straight / _LAST).read_text()
    assert [record["iteration"] for record in journal(run)] == list(range(8))
    assert journal(run) == journal(straight)
    assert detections(run) == detections(straight)
    ours, theirs = (json.loads((r / "results.json").read_text()) for r in (run, straight))
    assert ours == theirs
    assert not list(run.rglob("*.partial"))


def test_random_kills(trainer, tmp_path, capsys):
    straight = trainer.finish(tmp_path / "straight")
    killer = D2Killer(trainer, random.Random(0))
    runs = killer.kill(20)
    with capsys.disabled():
        print(f"\n{killer.figures()}")
    for run in runs:
        assert_same_run(run, straight)


def dies_in_one(rank: int) -> None:
    """What a launched process does; the others wait for it."""
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def test_a_process_that_is_killed_is_named(tmp_path, monkeypatch, capsys):
    """Detectron2 starts several processes only where there are GPUs, with this function."""

    def launch(*arguments: object, **keywords: object) -> None:
        torch.multiprocessing.spawn(dies_in_one, nprocs=2)

    monkeypatch.setattr(train_net, "launch", launch)
    monkeypatch.setattr(train_net, "check_run", lambda *arguments, **keywords: [])
    assert write_launch(tmp_path).main("--num-gpus", 2) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: process 1 was ended by SIGKILL, so all are;")
    assert said.endswith("go on from the last checkpoint with the same command and --resume")
