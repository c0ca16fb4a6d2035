"""A run that is killed at any moment, again and again, ends with the bits of one that was not."""

import contextlib
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from d2ctx.recovery.checkpoints import to_resume_from
from d2ctx.recovery.journal import read_journal
from tests.d2ctx.launch import Launch
from tests.d2ctx.test_train_net import final_state

KILLS, ITERATIONS = 15, 24
OPTS = (
    *("INPUT.MIN_SIZE_TRAIN", "(32, 40)", "SEED", 3, "DATASETS.TEST", "()"),
    *("SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.MAX_ITER", ITERATIONS, "SOLVER.STEPS", "(20,)"),
)


def run(launch: Launch, args: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        os._exit(launch.main(*args))


def started(launch: Launch, *args: object) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=run, args=(launch, args))
    process.start()
    return process


def wait_for_more(folder: Path, process: multiprocessing.Process) -> None:
    """Until another checkpoint is there, so that every life goes on a little."""
    before = len(list(folder.glob("model_*.pth")))
    while process.is_alive() and len(list(folder.glob("model_*.pth"))) <= before:
        time.sleep(0.01)


@pytest.mark.stress
@pytest.mark.timeout(1200)  # 30 s on an idle machine, which it may not have
def test_killed_again_and_again(launch, tmp_path):
    whole = tmp_path / "whole"
    straight = started(launch, *OPTS, "OUTPUT_DIR", whole)
    straight.join()
    assert straight.exitcode == 0
    moments = random.Random(0)
    killed = 0
    while killed < KILLS:
        process = started(launch, "--resume", *OPTS)
        wait_for_more(launch.output, process)
        time.sleep(moments.uniform(0.0, 0.3))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if process.exitcode != -signal.SIGKILL:
            assert process.exitcode == 0  # it was at its end
            break
        killed += 1
        for path in to_resume_from(launch.output):
            torch.load(path, weights_only=True)
    process = started(launch, "--resume", *OPTS)
    process.join()
    assert process.exitcode == 0
    expected, found = final_state(whole)["model"], final_state(launch.output)["model"]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert read_journal(launch.output) == read_journal(whole)
    assert not list(launch.output.glob("*.partial"))
    print(f"survived {killed} kills")
