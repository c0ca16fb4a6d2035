"""Multi-scale deformable attention at the sizes of UN-EPT's encoder."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases.case import MEMORY, TIME, Case
from benchmarks.rows import Target
from ctxops import deformable_attention

LEVELS = [(60, 60)] * 3
HEADS, POINTS, HEAD_WIDTH = 8, 16, 32


def _inputs() -> Sequence[Tensor]:
    tokens = sum(height * width for height, width in LEVELS)
    value = torch.randn(1, tokens, HEADS, HEAD_WIDTH)
    # A few cells around each query's own place, as after the usual initialisation.
    places = torch.rand(1, tokens, 1, 1, 1, 2)
    offsets = 4 / 60 * torch.randn(1, tokens, HEADS, len(LEVELS), POINTS, 2)
    weights = torch.randn(1, tokens, HEADS, len(LEVELS) * POINTS).softmax(-1)
    return value, places + offsets, weights.unflatten(-1, (len(LEVELS), POINTS))


def _ours(impl: str) -> Callable[..., Tensor]:
    def run(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return deformable_attention(value, LEVELS, locations, weights, impl=impl)

    return run


def _transformers() -> Callable[..., Tensor]:
    """The pure-PyTorch form of the `transformers` package."""
    from transformers.models.deformable_detr.modeling_deformable_detr import (
        MultiScaleDeformableAttention,
    )

    layer = MultiScaleDeformableAttention()
    shapes = torch.tensor(LEVELS)

    def run(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return layer(value, shapes, LEVELS, None, locations, weights, 64)

    return run


CASES = [
    Case(
        name="deformable attention, 3 levels of 60x60, 16 points",
        make=_inputs,
        forms={
            "transformers": _transformers,
            "grid_sample": partial(_ours, "grid_sample"),
            "chunked": partial(_ours, "chunked"),
        },
        baseline="transformers",
        targets={
            "chunked": {
                TIME: Target(of="ratio", limit=0.75),
                MEMORY: Target(of="ratio", limit=0.7),
            }
        },
    )
]
