"""Squeeze Reasoning against the non-local head, at 96x96 with 512 channels."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.cases.case import TIME, Case
from benchmarks.rows import Target
from ctxops import NonLocal, SqueezeReasoning

CHANNELS, SIDE = 512, 96
TENTH = {TIME: Target(of="ratio", limit=0.1)}


def _inputs() -> Sequence[Tensor]:
    return [torch.randn(1, CHANNELS, SIDE, SIDE)]


def _reasoning(squeeze: str) -> nn.Module:
    return SqueezeReasoning(in_channels=CHANNELS, squeeze=squeeze, norm="BN")


def _forms() -> dict[str, Callable[[], Callable[..., Tensor]]]:
    return {
        "non-local": partial(NonLocal, in_channels=CHANNELS),
        "SR, GHP": partial(_reasoning, "ghp"),
        "SR, GAP": partial(_reasoning, "gap"),
    }


CASES = [
    Case(
        name=f"squeeze reasoning, {SIDE}x{SIDE}x{CHANNELS}",
        make=_inputs,
        forms=_forms(),
        baseline="non-local",
        targets={"SR, GHP": TENTH, "SR, GAP": TENTH},
    )
]
