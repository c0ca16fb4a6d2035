"""Resizing maps [B, C, H, W] with the coordinate convention written out every time.

Sizes are (height, width). Pixel i of an axis covers [i, i + 1) and has its centre at i + 0.5.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


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
    return F.interpolate(x, size=list(size), mode="bilinear", align_corners=align_corners)


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
