"""Where one of two processes stops, both end, and a message names it and the update."""

import os
import signal
import subprocess
import sys
import time

import pytest

from segtrain import dist
from segtrain.train.start import Parts
from segtrain.watch import EXIT_CODE
from tests.segtrain.train_toys import IMAGES, ToyImages, ToyModel, feed
from tests.segtrain.two_processes import launched, started

pytestmark = pytest.mark.timeout(900)  # the machine may be busy
FOREVER, PATIENCE = 1000, 4  # seconds


def halt(*, rank: int, frozen: bool = False) -> None:
    """Never return in one process; the other goes on, and shall not wait for long."""
    dist.set_patience(PATIENCE / 60)
    if dist.rank() == rank:
        if frozen:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(FOREVER)


class At:
    """A hook that halts at a forward pass, of which every update has one."""

    def __init__(self, update, **keywords):
        self.update, self.keywords, self.calls = update, keywords, 0

    def __call__(self, *_):
        self.calls += 1
        if self.calls == self.update:
            halt(**self.keywords)


class Stuck(ToyImages):
    """A data set whose worker never gives the last image of the first epoch, of process 1."""

    def __getitem__(self, key):
        if key == (0, IMAGES - 1):
            time.sleep(FOREVER)
        return super().__getitem__(key)


def in_an_update(*, update=3, **keywords):
    """What `train` takes as `build`."""

    def parts(run, *_):
        model = ToyModel()
        model.register_forward_pre_hook(At(update, **keywords))
        return Parts(model=model, feed=feed(run), images=IMAGES)

    return parts


def in_a_data_worker(run, *_):
    """What `train` takes as `build`."""
    model = ToyModel()
    model.register_forward_pre_hook(At(2, rank=-1))
    return Parts(model=model, feed=feed(run, images=Stuck()), images=IMAGES)


SCRIPT = """
import sys
from pathlib import Path
import torch
from segtrain.train.start import train
from tests.segtrain import test_two_processes_hang as places
from tests.segtrain.train_toys import config
torch.set_num_threads(1)
torch.cuda.is_available = lambda: False
train(config(Path(sys.argv[1]) / "run", workers={workers}), build=places.{build})
"""


def check(processes, *, missing, waited="update 3"):
    """Both have ended, and say who did not arrive, once, and what it does."""
    assert [process.code for process in processes] == [EXIT_CODE] * 2, processes
    said = [process.errors for process in processes]
    text = f"error: process {missing} (last seen at update 3) did not arrive, 1 process waited for "
    text += f"it at {waited}: nothing has happened for {PATIENCE} seconds"
    assert [errors.count(text) for errors in said] == [missing, 1 - missing], processes
    assert [errors.count("is here:") for errors in said] == [1 - missing, missing], processes
    return said[missing]


def test_the_other_one_names_it(tmp_path):
    script = SCRIPT.format(workers=0, build="in_an_update(rank=1)")
    shown = check(started(script, tmp_path), missing=1)
    assert "in halt" in shown  # the line at which it stopped
    assert (tmp_path / "run/log.jsonl").is_file()


@pytest.mark.slow
def test_process_0_may_be_the_one(tmp_path):
    """It also keeps the store that they talk by."""
    script = SCRIPT.format(workers=0, build="in_an_update(rank=0)")
    check(started(script, tmp_path), missing=0)


@pytest.mark.slow
def test_a_data_worker_that_hangs(tmp_path):
    """The process that waits for its worker has not come to the update's first meeting."""
    script = SCRIPT.format(workers=1, build="in_a_data_worker")
    shown = check(started(script, tmp_path), missing=1)
    assert "dataloader.py" in shown


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_frozen_cannot_even_speak(tmp_path, rank):
    """As on a machine that is gone; `torchrun` or the user has to end it.

    Without `torchrun`, process 0 keeps the store that they talk by, and nothing is known.
    """
    script = SCRIPT.format(workers=0, build=f"in_an_update(rank={rank}, frozen=True)")
    processes = started(script, tmp_path, wait_for=1 - rank)
    assert processes[1 - rank].code == EXIT_CODE
    text = "error: process 0 or its machine does not answer"
    if rank:
        text = "error: process 1 (last seen at "  # when it last spoke
    assert text in processes[1 - rank].errors


@pytest.mark.slow
def test_torchrun_ends_with_it(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(workers=0, build="in_an_update(rank=1)"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode != 0
    text = "segtrain: error: process 1 (last seen at update 3) did not arrive"
    assert done.stderr.count(text) == 1, done.stderr
    assert "process 1 is here:" in done.stderr


@pytest.mark.slow
def test_a_script_that_ends_well_is_not_disturbed(tmp_path):
    script = "from segtrain import dist\nwith dist.process_group():\n    print(dist.rank())"
    assert launched(script, tmp_path) == (["0\n", "1\n"], ["", ""])
