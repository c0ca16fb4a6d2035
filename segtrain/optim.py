"""Optimizers with their parameter groups, and learning rates as functions of the step.

A schedule knows nothing but the step, so that resuming needs no state of its own. Every group keeps
its `lr_factor`: the learning rate of a group is that factor times the one of the schedule.

Letters: t step from 0, T number of steps.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from segtrain.config.schema import OptimConfig, ScheduleConfig


def build_optimizer(model: nn.Module, config: "OptimConfig") -> torch.optim.Optimizer:
    """Build SGD or AdamW over the trainable parameters.

    Args:
        model: What to train. Its `backbone_parameters()`, if it has them, are names or prefixes of
            names of the parameters that `backbone_lr_factor` is for.
        config: The section `optim`.

    Returns:
        The optimizer. One group where weight decay is 0 and no factor is set (Segmenter).
    """
    groups = parameter_groups(
        model,
        weight_decay=config.weight_decay,
        norm_weight_decay=config.norm_weight_decay,
        backbone_lr_factor=config.backbone_lr_factor,
    )
    for group in groups:
        group["lr"] = config.lr * group["lr_factor"]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=tuple(config.betas))
    nesterov = config.nesterov and config.momentum > 0
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov)


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    norm_weight_decay: float | None = None,
    backbone_lr_factor: float = 1.0,
) -> list[dict]:
    """Sort the trainable parameters by learning rate and weight decay.

    Vectors (norms and biases) and what the model's `no_weight_decay()` names (positions, tokens)
    decay with `norm_weight_decay`.

    Args:
        model: See `build_optimizer`.
        weight_decay: Of matrices and kernels.
        norm_weight_decay: Of the others; None is 0.
        backbone_lr_factor: Learning rate of the backbone relative to the rest.

    Returns:
        Groups with `params`, `weight_decay`, `lr_factor`, in the order of the model's parameters.

    Raises:
        ValueError: If no parameter is trainable.
    """
    spared = set(_names(model, "no_weight_decay"))
    prefixes = tuple(_names(model, "backbone_parameters"))
    other_decay = 0.0 if norm_weight_decay is None else norm_weight_decay
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = other_decay if parameter.ndim <= 1 or name in spared else weight_decay
        factor = backbone_lr_factor if _starts_with(name, prefixes) else 1.0
        empty = {"params": [], "weight_decay": decay, "lr_factor": factor}
        groups.setdefault((factor, decay), empty)["params"].append(parameter)
    if not groups:
        raise ValueError("model: no parameter is trainable; unfreeze a part of it")
    return list(groups.values())


def _names(model: nn.Module, method: str) -> Iterable[str]:
    found = getattr(model, method, None)
    return found() if callable(found) else ()


def _starts_with(name: str, prefixes: Iterable[str]) -> bool:
    return any(name == prefix or name.startswith(prefix.rstrip(".") + ".") for prefix in prefixes)


@dataclass(frozen=True)
class Schedule:
    """The learning rate at every step: a curve, and a linear warm-up that multiplies it.

    Args:
        curve: Share of training done, t / T in [0, 1], to the learning rate without warm-up.
        iters: T.
        warmup_iters: Steps of the warm-up.
        warmup_factor: What multiplies the curve at step 0; 1 from step `warmup_iters` on.
    """

    curve: Callable[[int], float]
    iters: int
    warmup_iters: int = 0
    warmup_factor: float = 1.0

    def lr(self, step: int) -> float:
        """Learning rate of step t, counted from 0; t = T is where the curve ends.

        Args:
            step: t.

        Returns:
            The learning rate of a group whose factor is 1.
        """
        rate = self.curve(min(step, self.iters))
        if step >= self.warmup_iters:
            return rate
        return rate * (self.warmup_factor + (1 - self.warmup_factor) * step / self.warmup_iters)

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set the learning rates of step t.

        Args:
            optimizer: Of `build_optimizer`.
            step: t.

        Returns:
            `lr(step)`.
        """
        rate = self.lr(step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_factor"]
        return rate


def build_schedule(config: "ScheduleConfig", *, base_lr: float, iters: int) -> Schedule:
    """Build the schedule of a run.

    Args:
        config: The section `schedule`.
        base_lr: Learning rate at step 0 without warm-up.
        iters: T.

    Returns:
        The schedule. `poly` and `cosine` end at `min_lr` exactly.
    """
    floor = config.min_lr
    curves: dict[str, Callable[[int], float]] = {
        "poly": lambda t: _between(floor, base_lr, (1 - t / iters) ** config.power),
        "cosine": lambda t: _between(floor, base_lr, (1 + math.cos(math.pi * t / iters)) / 2),
        "step": lambda t: base_lr * config.gamma ** sum(t >= s for s in config.steps),
        "constant": lambda t: base_lr,
    }
    return Schedule(
        curve=curves[config.name],
        iters=iters,
        warmup_iters=config.warmup_iters,
        warmup_factor=config.warmup_factor,
    )


def _between(low: float, high: float, share: float) -> float:
    """`low` at 0 and `high` at 1, both exactly: (high - low) + low need not be high."""
    return high if share == 1 else (high - low) * share + low
