"""Two processes drop an update, stop and save together."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.engine import create_ddp_model
from detectron2.utils.events import EventStorage

from d2ctx.recovery.blackbox import examine
from d2ctx.recovery.hooks import Checkpoints
from d2ctx.recovery.updates import GuardedTrainer
from tests.d2ctx.test_recovery_nonfinite import FINITE, SOME_NAN, Net

# The batches of each process: the second one's second makes its model raise in the forward pass.
BATCHES = ([FINITE] * 3, [FINITE, SOME_NAN, FINITE])
ASKED = ([False, True, False], [False] * 3)  # whether a signal came


class Running:
    """What `Checkpoints` needs of a trainer in these processes."""

    iter, max_iter = 1, 9

    def __init__(self, folder: Path) -> None:
        self.journal, self.checkpointer, self.saved = self, self, []

    def flush(self) -> None:
        """As the journal's."""

    def save(self, name: str, *, iteration: int) -> None:
        self.saved.append((name, iteration))


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    found = {**updates(rank), **saving(folder)}
    torch.save(found, folder / f"{rank}.pt")
    store.set(f"done{rank}", "")
    store.wait(["done0", "done1"])
    os._exit(0)  # threads of gloo that outlive the interpreter abort the process now and then


def updates(rank: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Net().train()
    wrapped = create_ddp_model(model, broadcast_buffers=False, device_ids=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    asked = iter(ASKED[rank])
    trainer = GuardedTrainer(
        wrapped, BATCHES[rank], optimizer, amp=False, asked=lambda: next(asked)
    )
    steps, failure = [], None
    with EventStorage():
        for trainer.iter in range(3):
            trainer.run_step()
            failure = trainer.failure or failure
            parameters = [p.detach().clone() for p in model.parameters()]
            dropped = None if trainer.failure is None else trainer.failure.finite
            told = (trainer.stopping, dropped, dict(trainer.losses))
            steps.append({"parameters": parameters, "told": told})
        first = examine(trainer, copy.copy(failure))["first"]
    return {"steps": steps, "first": first}


def saving(folder: Path) -> dict[str, Any]:
    hook, running = Checkpoints(2), Running(folder)
    hook.trainer = running
    torch.manual_seed(dist.get_rank())
    hook.after_step()
    states = [state["torch"] for state in hook.generators]
    return {"saved": running.saved, "states": states}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each process found."""
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(worker, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_both_drop_what_one_cannot_use(two):
    for process in two:
        dropped = [step["told"][1] for step in process["steps"]]
        assert dropped == [None, [True, False], None]


def test_both_have_the_same_weights_which_the_dropped_update_left_alone(two):
    first, second = (
        [torch.cat([p.flatten() for p in step["parameters"]]) for step in process["steps"]]
        for process in two
    )
    assert all(map(torch.equal, first, second))
    assert torch.equal(first[1], first[0])
    assert not torch.equal(first[2], first[1])


def test_both_hear_of_the_signal_of_one(two):
    for process in two:
        assert [step["told"][0] for step in process["steps"]] == [False, True, False]


def test_both_know_the_mean_losses(two):
    assert two[0]["steps"][2]["told"] == two[1]["steps"][2]["told"]


def test_each_looks_at_its_own_batch(two):
    assert two[0]["first"] is None
    assert two[1]["first"]["kind"] == "input"


def test_the_main_process_saves_the_generators_of_both(two):
    assert two[0]["saved"] == [("model_0000001", 1)]
    assert two[1]["saved"] == two[1]["states"] == []
    expected = []
    for rank in (0, 1):
        torch.manual_seed(rank)
        expected.append(torch.get_rng_state())
    assert all(map(torch.equal, two[0]["states"], expected))
