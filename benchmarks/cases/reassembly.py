"""Content-aware reassembly, up and down."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.case import MEMORY, TIME, Case
from benchmarks.rows import Target
from ctxops import normalize_kernels, reassemble_down, reassemble_up

CHANNELS = 256
KERNEL_SIZE = 5
# The size that the targets are for; the other shows how they depend on it.
TARGET_SIZE = 100
EAGER = {TIME: Target(of="ratio", limit=0.4), MEMORY: Target(of="ratio", limit=1 / 3)}
COMPILED = {TIME: Target(of="ratio", limit=0.1)}


def unfold_up(x: Tensor, kernels: Tensor) -> Tensor:
    """Every window of the coarse map copied out, then one product with the four sub-pixels."""
    batch, channels, height, width = x.shape
    windows = F.unfold(x, KERNEL_SIZE, padding=KERNEL_SIZE // 2)
    windows = windows.view(batch, channels, KERNEL_SIZE**2, height, width)
    out = torch.einsum("bckhw,bkqhw->bcqhw", windows, kernels)
    return F.pixel_shuffle(out.flatten(1, 2), 2)


def unfold_down(x: Tensor, kernels: Tensor) -> Tensor:
    """Every window of the fine map copied out, multiplied and summed."""
    windows = F.unfold(x, KERNEL_SIZE, padding=KERNEL_SIZE // 2, stride=2)
    windows = windows.view(*x.shape[:2], KERNEL_SIZE**2, *kernels.shape[-2:])
    return torch.einsum("bckhw,bkhw->bchw", windows, kernels[:, :, 0])


def _inputs(direction: str, size: int) -> Sequence[Tensor]:
    scale, extent = (2, size) if direction == "up" else (1, 2 * size)
    x = torch.randn(1, CHANNELS, extent, extent)
    logits = torch.randn(1, KERNEL_SIZE**2 * scale**2, size, size)
    return x, normalize_kernels(logits, kernel_size=KERNEL_SIZE, scale=scale)


def _operator(direction: str, impl: str) -> Callable[..., Tensor]:
    if direction == "up":
        return partial(reassemble_up, impl=impl)
    return partial(reassemble_down, stride=2, impl=impl)


def _compiled(direction: str) -> Callable[..., Tensor]:
    return torch.compile(_operator(direction, "auto"), fullgraph=True)


def _case(direction: str, size: int) -> Case:
    unfold = unfold_up if direction == "up" else unfold_down
    return Case(
        name=f"reassembly, {direction}, 5x5, {size}x{size} windows",
        make=partial(_inputs, direction, size),
        forms={
            "unfold": lambda: unfold,
            "loop": partial(_operator, direction, "loop"),
            "chunked": partial(_operator, direction, "chunked"),
            "compiled": partial(_compiled, direction),
        },
        baseline="unfold",
        targets={"chunked": EAGER, "compiled": COMPILED} if size == TARGET_SIZE else {},
    )


CASES = [_case(direction, size) for direction in ("up", "down") for size in (50, 100)]
