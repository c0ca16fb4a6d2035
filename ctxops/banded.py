"""Content-aware reassembly as banded matrix products: the eager path of `reassembly`.

The windows of neighbouring output pixels overlap, so a tile of r x w windows reads a patch of only
(r + k - 1) x (w + k - 1) pixels (stride 1). With the patch as a matrix [C, K] and the kernels
written into a band matrix [K, N], zero but for the k^2 taps of each column, the tile is one product
[C, K] @ [K, N] for all channels at once. It multiplies many zeros and is still several times faster
than a product per window, because it is a large matrix product on data that stays in cache: rows of
tiles are taken in chunks of bounded size, and nothing is kept for the backward pass but the
arguments. The taps of all columns lie at affine offsets in the band, so one strided copy writes
them and one reads their gradient.

Zeros of the band times an infinite or NaN feature are NaN: a non-finite value of the map (in the
backward pass, of the gradient) spreads over its tile, up to about a dozen pixels, where the
definition spreads it over its k x k window. Finite values are not affected.

Letters: B batch, C channels, H W map, Ho Wo map of windows, k window, s sub-pixels per axis,
T tiles, r w windows per tile, K pixels of a patch, N = r w s^2 outputs of a tile.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ctxops.precision import autocast_off, widen, widened_dtype
from ctxops.tiling import Tiles, kernel_sides, tilings

# Bytes of one chunk, per thread: few enough to stay in cache, or enough to fill an accelerator.
CHUNK_BYTES_CPU = 2**21
CHUNK_BYTES_ACCELERATOR = 2**26


def _chunks(x: Tensor, kernels: Tensor, stride: int) -> Iterator[tuple[Tiles, Tensor]]:
    """Chunks of bounded size, each with its bands, zero but for the taps of its kernels."""
    dtype = widened_dtype(x.dtype)
    channels = x.shape[1]
    on_cpu = x.device.type == "cpu"
    budget = CHUNK_BYTES_CPU * torch.get_num_threads() if on_cpu else CHUNK_BYTES_ACCELERATOR
    for region in tilings(x, kernels, stride):
        pixels, outputs = region.band_shape
        tile_bytes = dtype.itemsize * (channels * (pixels + outputs) + pixels * outputs)
        max_tiles = max(1, budget // tile_bytes)
        chunks = list(region.chunks(max_tiles))
        buffer = x.new_zeros(chunks[0].count, pixels, outputs, dtype=dtype)
        for tiles in chunks:
            band = buffer[: tiles.count]
            # Every chunk overwrites the same places of the buffer; the rest stays zero.
            tiles.taps_of(band).copy_(tiles.kernels_of(kernels))
            yield tiles, band


class BandedReassembly(torch.autograd.Function):
    """out = sum over taps of kernels * windows, sub-pixels in place; see `reassembly`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Tensor, stride: int) -> Tensor:
        """[B, C, H, W], [B, k^2, s^2, Ho, Wo] -> [B, C, Ho s, Wo s]."""
        ctx.save_for_backward(x, kernels)
        ctx.stride = stride
        _, scale = kernel_sides(kernels)
        height, width = (extent * scale for extent in kernels.shape[-2:])
        out = x.new_empty(*x.shape[:2], height, width)
        with autocast_off(x):
            padded = _pad(x, kernels)
            for tiles, band in _chunks(x, kernels, stride):
                patches = tiles.patches_of(padded).reshape(tiles.count, x.shape[1], -1)
                target = tiles.outputs_of(out)
                target.copy_((patches @ band).view(target.shape))  # [T, C, N]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Gradients of both arguments, each only where it is asked for."""
        x, kernels = ctx.saved_tensors
        for_x, for_kernels, _ = ctx.needs_input_grad
        channels = x.shape[1]
        margin = kernel_sides(kernels)[0] // 2
        with autocast_off(x):
            padded = _pad(x, kernels) if for_kernels else None
            grad_kernels = torch.empty_like(kernels) if for_kernels else None
            height, width = (extent + 2 * margin for extent in x.shape[2:])
            shape = (*x.shape[:2], height, width)
            grad_padded = x.new_zeros(shape, dtype=widened_dtype(x.dtype)) if for_x else None
            for tiles, band in _chunks(x, kernels, ctx.stride):
                grads = tiles.outputs_of(grad_out).to(band.dtype)
                grads = grads.reshape(tiles.count, channels, -1)  # [T, C, N]
                if padded is not None and grad_kernels is not None:
                    patches = tiles.patches_of(padded).reshape(tiles.count, channels, -1)
                    grad_band = patches.transpose(1, 2) @ grads  # [T, K, N]
                    tiles.kernels_of(grad_kernels).copy_(tiles.taps_of(grad_band))
                if grad_padded is not None:
                    _add_patches(tiles, grad_padded, grads @ band.transpose(1, 2))  # [T, C, K]
        if grad_padded is None:
            return None, grad_kernels, None
        grad_x = grad_padded[..., margin : margin + x.shape[2], margin : margin + x.shape[3]]
        return grad_x.to(x.dtype), grad_kernels, None


def _pad(x: Tensor, kernels: Tensor) -> Tensor:
    """Zero margin of k // 2, contiguous, in at least float32."""
    margin = kernel_sides(kernels)[0] // 2
    return F.pad(widen(x), [margin] * 4).contiguous()


def _add_patches(tiles: Tiles, padded: Tensor, patches: Tensor) -> None:
    """Add patches [T, C, K] into a padded map; those that overlap go in one after the other."""
    target = tiles.patches_of(padded)
    source = patches.view(target.shape)
    for part in tiles.disjoint_parts():
        target[:, *part].add_(source[:, *part])
