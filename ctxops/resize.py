"""Resizing maps [B, C, H, W] with the coordinate convention written out every time.

Sizes are (height, width). Pixel i of an axis covers [i, i + 1) and has its centre at i + 0.5.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ctxops.products import is_plain_float32, product

# Narrow maps become large ones by matrices; those of wider maps would cost more than they save.
WIDEST_BY_MATRIX = 64
FEWEST_BY_MATRIX = 2**20  # numbers of the large map


def resize_bilinear(x: Tensor, size: Sequence[int], *, align_corners: bool) -> Tensor:
    """Bilinear interpolation to a given size.

    Args:
        x: Map [B, C, H, W].
        size: Target (H', W').
        align_corners: False matches the pixel edges of both maps, True the centres of the corner
            pixels. There is no default.

    Returns:
        Map [B, C, H', W'].
    """
    if _pays(x, size):
        out: Tensor = _Enlarge.apply(x, (size[0], size[1]), align_corners)
        return out
    return F.interpolate(x, size=list(size), mode="bilinear", align_corners=align_corners)


class _Enlarge(torch.autograd.Function):
    """PyTorch's interpolation, with a backward pass of two matrix products.

    Rows and columns are interpolated one after the other, Y = R X C^T, so that dX = R^T dY C.
    PyTorch's own backward pass scatters number by number: six times slower for 32x32 to 512x512.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
        """[B, C, H, W] -> [B, C, H', W']."""
        ctx.shape, ctx.align_corners = x.shape, align_corners
        return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of x; linear in `grad_out`, which torch.matmul can differentiate."""
        times = torch.matmul if torch.is_grad_enabled() else product
        old, new = ctx.shape[2:], grad_out.shape[2:]
        rows, columns = (_weights(a, b, ctx.align_corners) for a, b in zip(old, new, strict=True))
        narrow = times(grad_out.reshape(-1, new[1]), columns)  # [B C H', W]
        grad = rows.t() @ narrow.view(-1, new[0], old[1])  # [B C, H, W]
        return grad.view(ctx.shape), None, None


def _weights(old: int, new: int, align_corners: bool) -> Tensor:
    """R [new, old]: how much of every old position is in every new one."""
    unit = torch.eye(old)[None, None]
    mode, size = "bilinear", [new, old]
    return F.interpolate(unit, size=size, mode=mode, align_corners=align_corners)[0, 0]


def _pays(x: Tensor, size: Sequence[int]) -> bool:
    if not x.requires_grad or not is_plain_float32(x) or x.dim() != 4:
        return False
    larger = size[0] >= x.shape[2] and size[1] >= x.shape[3]
    narrow = max(x.shape[2:]) <= WIDEST_BY_MATRIX
    count = x.shape[0] * x.shape[1] * size[0] * size[1]
    # Where channels come last they stay there, which matrices do not help with.
    return larger and narrow and x.is_contiguous() and count >= FEWEST_BY_MATRIX


def crop(x: Tensor, size: Sequence[int]) -> Tensor:
    """Keep the top left part of a map.

    Args:
        x: Map [B, C, H, W].
        size: (H', W') with H' <= H and W' <= W.

    Returns:
        View [B, C, H', W'].
    """
    return x[..., : size[0], : size[1]]


def max_pool(x: Tensor, *, stride: int) -> Tensor:
    """Maximum over non-overlapping `stride` x `stride` windows; those at the far border may be cut.

    Args:
        x: Map [B, C, H, W].
        stride: Window size and stride.

    Returns:
        Map [B, C, ceil(H / stride), ceil(W / stride)].
    """
    return F.max_pool2d(x, kernel_size=stride, stride=stride, ceil_mode=True)


def subsample(x: Tensor, *, stride: int) -> Tensor:
    """Every `stride`-th pixel, that is max-pooling with a 1x1 window.

    Args:
        x: Map [B, C, H, W].
        stride: Distance between the pixels kept.

    Returns:
        Map [B, C, ceil(H / stride), ceil(W / stride)].
    """
    return F.max_pool2d(x, kernel_size=1, stride=stride)
