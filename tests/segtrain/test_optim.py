import math

import pytest
import torch
from torch import nn

from segtrain.config.schema import OptimConfig, ScheduleConfig
from segtrain.optim import build_optimizer, build_schedule, parameter_groups


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.encoder_two = nn.Linear(2, 2)
        self.pos_embed = nn.Parameter(torch.zeros(1, 2, 2))
        self.head = nn.Linear(4, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def backbone_parameters(self):
        return ("encoder.",)

    def no_weight_decay(self):
        return {"pos_embed"}


def names(model, group):
    known = {id(p): name for name, p in model.named_parameters()}
    return {known[id(p)] for p in group["params"]}


def test_one_group_without_weight_decay_and_nesterov_is_set():
    optimizer = build_optimizer(Model(), OptimConfig(lr=1e-3))
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.SGD)
    assert (group["nesterov"], group["momentum"], group["weight_decay"]) == (True, 0.9, 0.0)
    assert len(group["params"]) == 9  # all but the frozen


def test_groups_of_decay_and_backbone():
    model = Model()
    optimizer = build_optimizer(
        model,
        OptimConfig(name="adamw", lr=1e-3, weight_decay=0.1, backbone_lr_factor=0.5),
    )
    found = {
        (group["lr"], group["weight_decay"]): names(model, group)
        for group in optimizer.param_groups
    }
    norms = {"encoder.1.weight", "encoder.1.bias"}
    assert found == {
        (5e-4, 0.1): {"encoder.0.weight"},
        (5e-4, 0.0): {"encoder.0.bias", *norms},
        (1e-3, 0.1): {"encoder_two.weight", "head.weight"},
        (1e-3, 0.0): {"pos_embed", "encoder_two.bias", "head.bias"},
    }
    assert isinstance(optimizer, torch.optim.AdamW)


def test_weight_decay_of_norms_can_be_given():
    model = Model()
    groups = parameter_groups(model, weight_decay=0.1, norm_weight_decay=0.1)
    assert [group["weight_decay"] for group in groups] == [0.1]


def test_betas_reach_adamw():
    optimizer = build_optimizer(Model(), OptimConfig(name="adamw", lr=1e-3, betas=(0.8, 0.7)))
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.7)


def test_a_model_without_anything_to_train_is_refused():
    with pytest.raises(ValueError, match="no parameter is trainable"):
        parameter_groups(nn.Linear(1, 1).requires_grad_(False), weight_decay=0.0)


def schedule(iters=100, base_lr=1e-3, **keywords):
    return build_schedule(ScheduleConfig(**keywords), base_lr=base_lr, iters=iters)


@pytest.mark.parametrize("min_lr", [0.0, 1e-5, 3e-7, 9.82e-5])
@pytest.mark.parametrize("name", ["poly", "cosine"])
@pytest.mark.parametrize("base_lr", [1e-3, 1.08e-3, 0.7])
def test_curves_start_and_end_exactly(name, min_lr, base_lr):
    curve = schedule(name=name, min_lr=min_lr, base_lr=base_lr, iters=161_700)
    assert curve.lr(0) == base_lr
    assert curve.lr(161_700) == min_lr
    rates = [curve.lr(step) for step in range(0, 161_701, 7)]
    assert all(a > b for a, b in zip(rates, rates[1:], strict=False))


def test_values_between():
    poly = schedule(min_lr=1e-5)
    assert poly.lr(30) == pytest.approx((1e-3 - 1e-5) * 0.7**0.9 + 1e-5, rel=1e-12)
    cosine = schedule(name="cosine", min_lr=1e-5)
    expected = 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * 0.3)) / 2
    assert cosine.lr(30) == pytest.approx(expected, rel=1e-12)
    step = schedule(name="step", steps=(50, 80), gamma=0.1)
    assert [step.lr(t) for t in (0, 49, 50, 79, 80)] == pytest.approx(
        [1e-3, 1e-3, 1e-4, 1e-4, 1e-5]
    )
    assert {schedule(name="constant").lr(t) for t in (0, 50, 100)} == {1e-3}


def test_warm_up_multiplies_the_curve():
    plain, warm = schedule(), schedule(warmup_iters=10, warmup_factor=0.1)
    assert warm.lr(0) == pytest.approx(0.1 * plain.lr(0))
    assert warm.lr(5) == pytest.approx(0.55 * plain.lr(5))
    assert [warm.lr(t) for t in (10, 50, 100)] == [plain.lr(t) for t in (10, 50, 100)]


def test_every_group_gets_its_factor():
    optimizer = build_optimizer(Model(), OptimConfig(lr=1e-3, backbone_lr_factor=0.1))
    assert schedule(name="step", steps=(1,)).apply(optimizer, 1) == pytest.approx(1e-4)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(
        [1e-4, 1e-5]
    )  # pos_embed comes first
