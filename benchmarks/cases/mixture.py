"""Mixture-of-softmaxes attention, global and in a window."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases.case import ERROR, MEMORY, TIME, Case
from benchmarks.rows import Target
from ctxops import local_mixture_attention, mixture_attention

CHANNELS = 256
# The default of the modules: 1 / sqrt(width of all parts together).
SCALE = CHANNELS**-0.5
TWO_GIB = Target(of="value", limit=2048)


def _tokens(tokens: int, parts: int) -> Callable[[], Sequence[Tensor]]:
    def make() -> Sequence[Tensor]:
        # Mean and deviation 1: distances are harder to get right where the mean is not zero.
        maps = [1 + torch.randn(1, tokens, CHANNELS) for _ in range(3)]
        return *maps, torch.randn(1, parts).softmax(-1)

    return make


def _maps(side: int, parts: int) -> Callable[[], Sequence[Tensor]]:
    def make() -> Sequence[Tensor]:
        maps = [torch.randn(1, CHANNELS, side, side) for _ in range(3)]
        return *maps, torch.randn(1, parts).softmax(-1)

    return make


def _forms(names: Sequence[str], similarity: str) -> dict[str, Callable[[], Callable[..., Tensor]]]:
    return {
        name: partial(partial, mixture_attention, similarity=similarity, scale=SCALE, impl=name)
        for name in names
    }


def _local_forms(names: Sequence[str]) -> dict[str, Callable[[], Callable[..., Tensor]]]:
    return {
        name: partial(
            partial,
            local_mixture_attention,
            window=5,
            similarity="euclidean",
            scale=SCALE,
            impl=name,
        )
        for name in names
    }


CASES = [
    Case(
        name="mixture, euclidean, 4 parts, 5000 tokens",
        make=_tokens(5000, 4),
        forms=_forms(["naive", "sdpa", "chunked"], "euclidean"),
        baseline="naive",
        reference="naive",
        targets={
            "chunked": {
                TIME: Target(of="ratio", limit=0.8),
                MEMORY: Target(of="ratio", limit=1 / 8),
                ERROR: Target(of="ratio", limit=1),
            }
        },
    ),
    Case(
        name="mixture, dot, 2 parts, 5000 tokens",
        make=_tokens(5000, 2),
        forms=_forms(["naive", "sdpa", "chunked"], "dot"),
        baseline="naive",
        reference="naive",
    ),
    Case(
        name="mixture, euclidean, 4 parts, 16800 tokens",
        make=_tokens(16_800, 4),
        forms=_forms(["sdpa", "chunked"], "euclidean"),
        baseline="sdpa",
        targets={"chunked": {MEMORY: TWO_GIB}},
        once=True,
    ),
    Case(
        name="mixture, dot, 2 parts, 67200 tokens",
        make=_tokens(67_200, 2),
        forms=_forms(["chunked"], "dot"),
        baseline="chunked",
        backward=False,
        targets={"chunked": {MEMORY: TWO_GIB}},
        once=True,
    ),
    Case(
        name="local mixture, window 5, 4 parts, 122x122",
        make=_maps(122, 4),
        forms=_local_forms(["unfold", "loop", "chunked"]),
        baseline="unfold",
        targets={
            "chunked": {
                TIME: Target(of="ratio", limit=0.4),
                MEMORY: Target(of="ratio", limit=1 / 3),
            }
        },
    ),
]
