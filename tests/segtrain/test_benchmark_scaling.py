"""The cost model of several processes: its formulas, and what DDP really sends."""

import pytest
import torch
import torch.distributed as torch_dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks import communication as cost
from benchmarks import scaling
from benchmarks.communication import Link, Network, fit
from tests.segtrain.train_toys import ToyModel


def network(**changes):
    return Network(**({"parameters": 1000, "buffers": 50, "norms": (8, 16)} | changes))


def test_a_ring_sends_every_byte_about_twice():
    assert cost.all_reduce(100, 1) == 0
    assert cost.all_reduce(100, 2) == 100
    assert cost.all_reduce(100, 4) == 150
    assert cost.all_gather(100, 4) == 75


def ring(pieces: int) -> int:
    """Pieces that each of `pieces` processes sends to sum a list of as many pieces, in a loop."""
    lists = [[{rank} for _ in range(pieces)] for rank in range(pieces)]
    sent = 0
    for phase, merge in enumerate((set.union, lambda _, whole: whole)):
        for turn in range(pieces - 1):
            moves = [(r, (r + phase - turn) % pieces) for r in range(pieces)]
            taken = [set(lists[rank][piece]) for rank, piece in moves]
            for (rank, piece), what in zip(moves, taken, strict=True):
                target = lists[(rank + 1) % pieces]
                target[piece] = merge(target[piece], what)
            sent += 1
    assert all(piece == set(range(pieces)) for one in lists for piece in one)
    return sent


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_the_formula_is_that_of_the_algorithm(processes):
    assert ring(processes) == pytest.approx(cost.all_reduce(processes, processes))


def test_one_process_sends_nothing():
    alone = network()
    assert cost.gradients(alone, 1) == cost.synced_norms(alone, 1) == cost.buffers(alone, 1) == 0
    assert cost.shards(alone, 1) == cost.evaluation(19, 1) == 0


def test_costs_by_hand():
    net = network()
    assert cost.gradients(net, 2) == 4000
    # Forward: the other's 2 * 8 + 1 and 2 * 16 + 1 numbers; backward: sums of 16 and 32.
    assert cost.synced_norms(net, 2) == 4 * (17 + 33) + 4 * (16 + 32)
    assert cost.synced_norms(net, 4) == 3 * 4 * (17 + 33) + 1.5 * 4 * (16 + 32)
    assert cost.buffers(net, 2) == cost.buffers(net, 8) == 200
    # Twice the weights, once the gradients: half as much again as DDP; with bf16 as much as DDP.
    assert cost.shards(net, 2) == 1.5 * cost.gradients(net, 2)
    assert cost.shards(net, 2, weight_bytes=2) == cost.gradients(net, 2)
    assert cost.evaluation(3, 2) == 8 * 10
    assert cost.evaluation(3, 2, detailed=True) == 8 * 28


def test_what_a_model_has():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.SyncBatchNorm(4), nn.GELU())
    model[0].bias.requires_grad_(False)
    found = Network.of(model)
    assert found == Network(parameters=24 + 16 + 8, buffers=2 * 8 + 1 + 2 * 4 + 1, norms=(8, 4))


def test_ddp_sends_the_bytes_of_the_model():
    """Counted where DDP hands its buckets over."""
    sent = []

    def count(_, bucket):
        sent.append(bucket.buffer().nbytes)
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    torch_dist.init_process_group("gloo", store=torch_dist.HashStore(), rank=0, world_size=1)
    try:
        model = ToyModel(norm=True)
        ddp = DistributedDataParallel(model)
        ddp.register_comm_hook(None, count)
        outputs = ddp(torch.randn(2, 3, 8, 8))
        (outputs["logits"].sum() + outputs["aux"][0].sum()).backward()
    finally:
        torch_dist.destroy_process_group()
    # With two processes, each sends as much as it has.
    assert sum(sent) == cost.gradients(Network.of(model), 2)


def test_a_link_is_fitted_to_its_ends():
    link = fit({64: 1e-3, 1064: 2e-3, 4064: 5e-3}, 2)
    assert link == Link(latency=1e-3, bandwidth=pytest.approx(1e6))
    assert link.seconds(2e6, messages=3) == pytest.approx(2.003)
    with pytest.raises(ValueError, match="the larger one slower, got .*; measure again"):
        fit({64: 1e-3, 4064: 1e-3}, 2)


def test_costs_of_a_real_network():
    """SR on a ResNet-50: parameters as its page says, MB that each process sends."""
    model, classes = scaling.semantic_model(scaling.SEMANTIC["SR, ResNet-50"])
    assert classes == 19
    row = scaling._costs(Network.of(model), classes)
    assert row["parameters"] == 38_200_358
    assert row["mb_sent_by_each_of_2"]["gradients"] == pytest.approx(4e-6 * row["parameters"])
    assert set(row) == {"parameters", "batch_norms"} | {
        f"mb_sent_by_each_of_{n}" for n in scaling.PROCESSES
    }
