"""Content-aware reassembly in Triton: forward and both gradients, without atomics.

One program computes a tile of neighbouring windows (or pixels) for a block of channels. Programs
that differ in the block only are neighbours in the launch, so that what they share, the kernels,
comes from cache. Sums are in float32 (float64 for float64) and their order is fixed: two runs give
the same bits. The gradient of the map is gathered: every pixel sums over the windows that read it.

Letters: B batch, C channels, H W map, Ho Wo map of windows, k window, s sub-pixels per axis.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ctxops.kernels.reassembly_jit import forward_kernel, grad_kernels_kernel, grad_map_kernel
from ctxops.precision import widened_dtype
from ctxops.tiling import kernel_sides

# Lanes of a warp run along the map, warps along the channels: nothing is exchanged between them.
# With fewer warps Triton lays them along the sub-pixels and every product goes through shared
# memory.
WARPS = 8
LANES = 32
BLOCK_CHANNELS = 32
# Rows of pixels per program in the gradient of the map: neighbours share most of their windows.
BLOCK_ROWS = 2
# The gradient of the kernels: taps and sums of a thread, more would not fit into its registers; and
# warps, each with every fourth channel.
BLOCK_TAPS = 16
BLOCK_SUMS = 64
SUM_WARPS = 4


def triton_forward(x: Tensor, kernels: Tensor, stride: int) -> Tensor:
    """Sum of kernels * windows over the taps, sub-pixels put in place; see `reassembly`.

    Args:
        x: Map [B, C, H, W].
        kernels: [B, k^2, s^2, Ho, Wo].
        stride: Distance of neighbouring windows.

    Returns:
        Map [B, C, s Ho, s Wo], contiguous, in the dtype of `x`.
    """
    x, kernels = x.contiguous(), kernels.contiguous()
    size, scale = kernel_sides(kernels)
    batch, channels, height, width = x.shape
    rows, columns = kernels.shape[-2:]
    out = x.new_empty(batch, channels, rows * scale, columns * scale)
    tiles = triton.cdiv(channels, BLOCK_CHANNELS) * triton.cdiv(rows * columns, LANES)
    with torch.cuda.device_of(x):
        forward_kernel[(batch * tiles,)](
            *(x, kernels, out, channels, height, width, rows, columns),
            SIZE=size,
            SCALE=scale,
            STRIDE=stride,
            SUBS=triton.next_power_of_2(scale**2),
            BLOCK_C=BLOCK_CHANNELS,
            BLOCK_P=LANES,
            SUM=_sum_dtype(x),
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return out


def triton_backward(
    grad_out: Tensor, x: Tensor, kernels: Tensor, stride: int, for_x: bool, for_kernels: bool
) -> list[Tensor]:
    """Gradients of both arguments, each only where it is asked for.

    Args:
        grad_out: [B, C, s Ho, s Wo].
        x: As in `triton_forward`.
        kernels: As in `triton_forward`.
        stride: As in `triton_forward`.
        for_x: Whether the gradient of `x` is wanted.
        for_kernels: Whether that of the kernels is.

    Returns:
        Those asked for, in this order, contiguous, each in the dtype of its argument.
    """
    grad_out, x, kernels = grad_out.contiguous(), x.contiguous(), kernels.contiguous()
    with torch.cuda.device_of(x):
        found = [_launch_grad_map(grad_out, x, kernels, stride)] if for_x else []
        if for_kernels:
            found.append(_launch_grad_kernels(grad_out, x, kernels, stride))
    return found


def _launch_grad_map(grad_out: Tensor, x: Tensor, kernels: Tensor, stride: int) -> Tensor:
    size, scale = kernel_sides(kernels)
    batch, channels, height, width = x.shape
    rows, columns = kernels.shape[-2:]
    sub_columns = triton.next_power_of_2(scale)
    positions = max(1, LANES // sub_columns)
    grad_x = torch.empty_like(x)
    tiles = (
        triton.cdiv(channels, BLOCK_CHANNELS)
        * triton.cdiv(triton.cdiv(width, stride), positions)
        * triton.cdiv(triton.cdiv(height, stride), BLOCK_ROWS)
    )
    grad_map_kernel[(batch * stride**2 * tiles,)](
        *(grad_out, kernels, grad_x, channels, height, width, rows, columns),
        SIZE=size,
        SCALE=scale,
        STRIDE=stride,
        TAPS=triton.cdiv(size, stride),
        SUB_COLUMNS=sub_columns,
        BLOCK_R=BLOCK_ROWS,
        BLOCK_C=BLOCK_CHANNELS,
        BLOCK_P=positions,
        SUM=_sum_dtype(x),
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return grad_x


def _launch_grad_kernels(grad_out: Tensor, x: Tensor, kernels: Tensor, stride: int) -> Tensor:
    size, scale = kernel_sides(kernels)
    batch, channels, height, width = x.shape
    rows, columns = kernels.shape[-2:]
    grad_kernels = torch.empty_like(kernels)
    subs = triton.next_power_of_2(scale**2)
    taps = min(BLOCK_TAPS, max(1, BLOCK_SUMS // subs))
    tiles = triton.cdiv(size**2, taps) * triton.cdiv(rows * columns, LANES)
    grad_kernels_kernel[(batch * tiles,)](
        *(grad_out, x, grad_kernels, channels, height, width, rows, columns),
        SIZE=size,
        SCALE=scale,
        STRIDE=stride,
        SUBS=subs,
        BLOCK_T=taps,
        BLOCK_C=SUM_WARPS,
        BLOCK_P=LANES,
        SUM=_sum_dtype(x),
        num_warps=SUM_WARPS,
        enable_fp_fusion=True,
    )
    return grad_kernels


def _sum_dtype(x: Tensor) -> Any:
    return tl.float64 if widened_dtype(x.dtype) == torch.float64 else tl.float32
