"""Two processes train like one; they are started as `torchrun` does it, and talk by gloo."""

import pytest
import torch

from segtrain import dist
from segtrain.errors import UserError
from segtrain.train.journal import read_journal
from segtrain.train.start import train
from tests.segtrain.train_toys import assert_close, assert_same, build, config, weights
from tests.segtrain.two_processes import launched

OPTIONS = {"iters": 5, "ema_decay": 0.5, "optim": {"clip_norm": 0.5}}
_HEAD = f"""
import os, signal, sys
from pathlib import Path
import torch
from segtrain import dist
from segtrain.errors import Interrupted, UserError
from segtrain.train.start import Parts, resume, train
from tests.segtrain.test_train_loop import Poisoned
from tests.segtrain.train_toys import IMAGES, ToyModel, build, config, feed
torch.set_num_threads(1)
torch.cuda.is_available = lambda: False
folder, OPTIONS = Path(sys.argv[1]), {OPTIONS!r}
"""


SCENARIOS = """
def agreement():
    rank = dist.rank()
    assert dist.world_size() == 2
    values = torch.tensor([1.0 + rank, -3.0 * rank])
    assert dist.sum_over_processes(values).tolist() == [3.0, -3.0]
    assert dist.max_over_processes(values).tolist() == [2.0, 0.0]
    assert values.tolist() == [1.0 + rank, -3.0 * rank]
    assert dist.any_process(rank == 1) and not dist.any_process(False)
    assert dist.gather_objects({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert dist.is_main() == (rank == 0)
    dist.barrier()

def like_one():
    train(config(folder / "two", micro_batch=1, **OPTIONS), build=build(dropout=0.0))

class Signal:
    calls = 0
    def __call__(self, *_):
        self.calls += 1
        if self.calls == 6 and dist.rank() == 1:  # second pass of update 3
            os.kill(os.getpid(), signal.SIGTERM)

def stopping(*arguments):
    parts = build(dropout=0.3)(*arguments)
    parts.model.register_forward_pre_hook(Signal())
    return parts

def stop_and_resume():
    run = lambda name: config(folder / name, iters=6, micro_batch=1)
    train(run("straight"), build=build(dropout=0.3))
    try:
        train(run("halves"), build=stopping)
    except Interrupted as stop:
        assert "saved after update 3" in str(stop), stop
    resume(folder / "halves", build=build(dropout=0.3))

def poisoned():
    run = config(folder / "poisoned", iters=8)
    images = feed(run, images=Poisoned())
    try:
        train(run, build=lambda *_: Parts(model=ToyModel(), feed=images, images=IMAGES))
    except UserError as error:
        assert "the loss of update 3 is not finite" in str(error), error
        print("stopped")

# One group for all: a second one at the same port could meet the first one's end.
with dist.process_group() as device:
    assert device.type == "cpu"
    for scenario in (agreement, like_one, stop_and_resume, poisoned):
        scenario()
        print(scenario.__name__, flush=True)
assert (dist.world_size(), dist.rank()) == (1, int(os.environ["RANK"]))
print("left")
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Both processes after all scenarios, which share one launch because it takes seconds."""
    folder = tmp_path_factory.mktemp("two")
    said, errors = launched(_HEAD + SCENARIOS, folder)
    return folder, [out.split() for out in said], errors


def test_what_processes_agree_on(two):
    _, done, errors = two
    assert all("agreement" in names and "left" in names for names in done), errors


def test_two_processes_train_like_one(two, tmp_path):
    folder, done, errors = two
    assert all("like_one" in names for names in done), errors
    train(config(tmp_path, **OPTIONS), build=build(dropout=0.0))
    for name in ("last", "best"):
        ours, theirs = weights(folder / "two", name), weights(tmp_path, name)
        assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    logs = [
        [r["loss"] for r in read_journal(run / "log.jsonl") if r["event"] == "train"]
        for run in (folder / "two", tmp_path)
    ]
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)
    assert "batch 4 = 2 processes x 2 passes x 1 image" in errors[0]
    assert "batch 4" not in errors[1]


def test_two_processes_resume_exactly_when_one_of_them_is_told_to_stop(two):
    """Dropout is on: each process goes on with its own generators."""
    folder, done, errors = two
    assert all("stop_and_resume" in names for names in done), errors
    straight, halves = (
        torch.load(folder / name / "checkpoints/last.pt", weights_only=True)
        for name in ("straight", "halves")
    )
    assert straight["step"] == halves["step"] == 6
    assert_same(straight["model"], halves["model"])
    events = [r["event"] for r in read_journal(folder / "halves/log.jsonl")]
    assert events.count("resume") == events.count("stop") == 1
    drawn = [state["torch"] for state in straight["generators"]]
    assert not torch.equal(*drawn)


def test_a_loss_that_is_no_number_in_one_process_stops_both(two):
    _, done, errors = two
    assert all("stopped" in names for names in done), errors


def test_alone_nothing_communicates():
    values = torch.tensor([1.0])
    assert dist.sum_over_processes(values) is values
    assert (dist.rank(), dist.world_size(), dist.gather_objects(3)) == (0, 1, [3])
    assert dist.any_process(True)
    with dist.process_group():
        assert not torch.distributed.is_initialized()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with (
        pytest.raises(ValueError, match="has no GPU of its own, there are 1; start at most"),
        dist.process_group(),
    ):
        pass


def test_a_batch_that_cannot_be_split_evenly_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "world_size", lambda: 3)
    with pytest.raises(
        UserError, match="4 is no multiple of 1 image in each of 3 processes; write"
    ):
        train(config(tmp_path), build=build())
