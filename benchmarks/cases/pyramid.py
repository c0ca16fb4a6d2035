"""A whole Feature Pyramid Transformer over image sizes, until the materialised form fails."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.cases.case import Case
from ctxops import build_fpt

CHANNELS, STRIDES = 256, (4, 8, 16, 32)
SIZES = [(200, 336), (400, 672), (600, 1008), (800, 1344)]


class Flat(nn.Module):
    """The maps of a neck as one tensor, in evaluation mode."""

    def __init__(self, neck: nn.Module) -> None:
        super().__init__()
        self.neck = neck.eval()

    def forward(self, *maps: Tensor) -> Tensor:
        """[B, C, H_l, W_l] per level -> one vector."""
        return torch.cat([out.flatten() for out in self.neck(list(maps))])


def _maps(height: int, width: int) -> Sequence[Tensor]:
    return [torch.randn(1, CHANNELS, -(-height // s), -(-width // s)) for s in STRIDES]


def _fpt(impl: str, kv_pool: Sequence[int] = (1, 1, 1, 1)) -> nn.Module:
    levels = [CHANNELS] * len(STRIDES)
    return Flat(build_fpt(in_channels=levels, lateral="none", impl=impl, kv_pool=kv_pool))


CASES = [
    Case(
        name=f"FPT, all pairs, {height}x{width} image",
        make=partial(_maps, height, width),
        forms={
            "naive": partial(_fpt, "naive"),
            "default": partial(_fpt, "auto"),
            "keys of p2, p3 pooled": partial(_fpt, "auto", (2, 2, 1, 1)),
        },
        baseline="naive",
        backward=False,
        once=True,
    )
    for height, width in SIZES
]
