"""Killing a run of segtrain again and again, and what must be true afterwards."""

import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from segtrain.train.journal import NAME as JOURNAL
from segtrain.train.journal import read_journal
from tests.segtrain.test_train_resume import assert_equal_trees
from tests.stress.faults import PHASES
from tests.stress.forks import ROOT, Fault, Forks, Run

COMMAND = "segtrain.cli:main"
_PATIENCE = 600.0  # seconds for something that must happen, on a busy machine


@dataclass
class Trainer:
    """Commands of one configuration of segtrain.

    Args:
        forks: Of `COMMAND`.
        config: Below `configs/seg`.
        keys: What is changed in it.
        folder: For all runs and what they say.
    """

    forks: Forks
    config: str
    keys: tuple[str, ...]
    folder: Path
    starts: int = 0
    phases = "tell_phase"

    def log(self, run: Path) -> Path:
        """A file for what the next start says."""
        self.starts += 1
        return self.folder / f"said_{run.name}_{self.starts:03d}.txt"

    def has_checkpoint(self, run: Path) -> bool:
        return any((run / "checkpoints").glob("*.pt"))

    def check(self, run: Path) -> None:
        """What must be true after a kill."""
        check_after_kill(run)

    def go_on(self, run: Path, *faults: Fault) -> Run:
        """Start a run, or go on with it from its checkpoint."""
        log = self.log(run)
        if self.has_checkpoint(run):
            return self.forks.start("resume", run, log=log, faults=faults)
        config = ("--config", ROOT / "configs/seg" / self.config)
        return self.forks.start(
            "train", *config, *self.keys, f"output={run}", log=log, faults=faults
        )

    def finish(self, run: Path, *faults: Fault) -> Path:
        """Go on to the end."""
        started = self.go_on(run, *faults)
        assert started.wait() == 0, started.said()
        return run


@dataclass
class Killer:
    """Ends runs at random moments.

    Args:
        trainer: Its runs.
        draw: Where the moments come from.
    """

    trainer: Trainer
    draw: random.Random
    kills: int = 0
    rounds: int = 0
    where: Counter[str] = field(default_factory=Counter)
    partial: int = 0
    before_first: int = 0

    def kill(self, wanted: int) -> list[Path]:
        """Kill so often.

        Returns:
            Run folders, all of them finished.
        """
        runs = []
        while self.kills < wanted:
            self.rounds += 1
            runs.append(self.trainer.folder / f"killed_{self.rounds}")
            while self.kills < wanted and self.killed(runs[-1]):
                self.trainer.check(runs[-1])
        return [self.trainer.finish(run) for run in runs]

    def killed(self, run: Path) -> bool:
        """Go on with a run until it is killed; False where it comes to its end before that."""
        phase = self.trainer.folder / "phase"
        phase.write_bytes(b"\0")
        started = self.trainer.go_on(run, (self.trainer.phases, {"path": str(phase)}))
        self.wait_for_moment(started, phase)
        code = started.kill()
        if code >= 0:
            assert code == 0, started.said()
            return False
        assert code == -9, started.said()
        self.kills += 1
        self.where[PHASES[phase.read_bytes()[0]]] += 1
        self.partial += any(run.rglob("*.partial"))
        self.before_first += not self.trainer.has_checkpoint(run)
        return True

    def wait_for_moment(self, started: Run, phase: Path) -> None:
        """Any time, or while something is done that is over soon."""
        target = self.draw.choice(["any", "start", "evaluate", "save", "partial"])
        passes, delay = self.draw.randrange(3), self.draw.random()
        if target == "any":
            time.sleep(delay * 1.5)
            return
        if target == "start":
            time.sleep(delay * 0.2)
            return
        end = time.monotonic() + _PATIENCE
        while passes >= 0 and not started.ended():
            assert time.monotonic() < end, started.said()
            if self.at(target, phase, started):
                passes -= 1
                while passes >= 0 and self.at(target, phase, started):
                    pass
        time.sleep(delay * 0.02)

    def at(self, target: str, phase: Path, started: Run) -> bool:
        """Whether what is waited for is being done now."""
        if target == "partial":
            run = self.trainer.folder / f"killed_{self.rounds}"
            return any(run.rglob("*.pt*.partial")) and not started.ended()
        return phase.read_bytes()[0] == PHASES.index(target) and not started.ended()

    def figures(self) -> str:
        where = ", ".join(f"{name} {count}" for name, count in sorted(self.where.items()))
        return (
            f"{self.kills} kills in {self.rounds} runs of {self.trainer.config}: {where}; "
            f"{self.partial} left an unfinished file, {self.before_first} no checkpoint"
        )


def check_after_kill(run: Path) -> None:
    """Everything in the folder of a run can be read, whenever it ended."""
    for path in (run / "checkpoints").glob("*.pt"):
        torch.load(path, weights_only=True)
    for path in (run / "checkpoints").glob("*.safetensors"):
        load_file(path)
    if (run / "results.json").exists():
        json.loads((run / "results.json").read_text())
    steps = [record["step"] for record in read_journal(run / JOURNAL)]
    assert steps == sorted(steps)


def assert_same_run(run: Path, straight: Path) -> None:
    """A run that was killed is, at its end, one that never was."""
    assert_equal_trees(whole_state(run), whole_state(straight))
    files = sorted(path.name for path in (straight / "checkpoints").iterdir())
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == files
    for name in files:
        if name.endswith(".safetensors"):
            ours, theirs = run / "checkpoints" / name, straight / "checkpoints" / name
            assert_equal_trees(load_file(ours), load_file(theirs), name)
            assert weight_step(ours) == weight_step(theirs), name
    assert read_results(run) == read_results(straight)
    for event in ("train", "evaluate"):
        assert journalled(run, event) == journalled(straight, event), event
    assert not [path for path in run.rglob("*partial*")]


def whole_state(run: Path) -> dict[str, Any]:
    state = torch.load(run / "checkpoints/last.pt", weights_only=True)
    del state["config"]  # names the folder
    return state


def weight_step(path: Path) -> str:
    with safe_open(path, "pt") as file:
        return file.metadata()["step"]


def read_results(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())


def journalled(run: Path, event: str) -> list[dict[str, Any]]:
    """Records of an event, without what depends on the machine."""
    machine = ("images_per_second", "memory_mb", "time")
    return [
        {key: value for key, value in record.items() if key not in machine}
        for record in read_journal(run / JOURNAL)
        if record["event"] == event
    ]
