"""Whether Triton kernels can run somewhere, found out without importing Triton.

`TRITON_INTERPRET=1`, set before Triton is imported, runs the kernels in Triton's interpreter, on
the CPU too. That is slow and meant for tests, so `auto` never chooses it.
"""

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

# Triton supports NVIDIA devices of this compute capability and later.
OLDEST_CAPABILITY = (8, 0)
INT32_LIMIT = 2**31
# No kernel takes more channels or taps than this at a time.
MAX_BLOCK = 64


def runs_triton(impl: str, device: torch.device, *, fits: bool) -> bool:
    """Whether a function that was asked for `impl` runs its Triton kernels.

    Args:
        impl: What the caller asked for; `auto` and `triton` mean something here.
        device: Where the tensors are.
        fits: Whether the kernels' 32-bit offsets reach all of them.

    Returns:
        True for `triton`, and for `auto` on CUDA devices where Triton is installed.

    Raises:
        ValueError: If `impl` is `triton` and it cannot run there.
    """
    if impl == "triton":
        obstacle = _obstacle(device)
        if obstacle:
            raise ValueError(f"impl: {obstacle}")
        if not fits:
            raise ValueError(
                "impl: 'triton' expected offsets inside a tile or an image below 2^31, got larger "
                "tensors; use 'auto' or smaller ones"
            )
        return True
    return impl == "auto" and device.type == "cuda" and fits and triton_available(device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def triton_available(device: torch.device) -> bool:
    """Whether the kernels can be compiled for a device.

    Args:
        device: Where the tensors are.

    Returns:
        True on CUDA devices that Triton supports, where it is installed.
    """
    if device.type != "cuda" or not _installed():
        return False
    return torch.version.hip is not None or _capability(device.index) >= OLDEST_CAPABILITY


def reassembly_fits(x: Tensor, kernels: Tensor) -> bool:
    """Whether offsets inside a tile of channels, and inside the kernels, fit into 32 bits.

    Args:
        x: Map [B, C, H, W].
        kernels: [B, k^2, s^2, Ho, Wo].

    Returns:
        True for every map of up to 2000 x 2000 windows.
    """
    _, taps, subs, rows, columns = kernels.shape
    outputs = subs * rows * columns
    largest = max(x.shape[2] * x.shape[3], outputs) * MAX_BLOCK
    return max(largest, (taps + MAX_BLOCK) * outputs) < INT32_LIMIT


def deformable_fits(value: Tensor, weights: Tensor) -> bool:
    """Whether offsets inside an image, and the numbers of samples and cells, fit into 32 bits.

    Args:
        value: [B, S, M, D].
        weights: [B, Q, M, L, N].

    Returns:
        False for more than about a billion samples, or values of one image.
    """
    batch, tokens, heads, width = value.shape
    _, queries, _, levels, points = weights.shape
    samples = batch * queries * heads * levels * points
    # A map of H W pixels has (H + 1)(W + 1) cells, at most four times as many.
    cells = 4 * batch * heads * tokens
    values = max(tokens, queries) * heads * width
    return max(values, 2 * samples, cells) < INT32_LIMIT


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _obstacle(device: torch.device) -> str:
    """What stops the kernels there, as the rest of an error message; empty for nothing."""
    if not _installed():
        return (
            "'triton' expected the package triton, got none; install it (pip install triton) or "
            "use 'auto'"
        )
    if triton_available(device) or os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    oldest = ".".join(map(str, OLDEST_CAPABILITY))
    return (
        f"'triton' expected tensors on a CUDA device of capability {oldest} or later, got {device};"
        " move them there or use 'auto' (to test on a CPU, set TRITON_INTERPRET=1 before triton is "
        "imported)"
    )


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


@cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
