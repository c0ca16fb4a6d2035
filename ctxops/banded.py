"""Content-aware reassembly as banded matrix products: the default path of `reassembly`.

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

import torch
import torch.nn.functional as F
from torch import Tensor

from ctxops.precision import widen, widened_dtype
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


def banded_forward(x: Tensor, kernels: Tensor, stride: int) -> Tensor:
    """Sum of kernels * windows over the taps, sub-pixels put in place; see `reassembly`.

    Args:
        x: Map [B, C, H, W].
        kernels: [B, k^2, s^2, Ho, Wo].
        stride: Distance of neighbouring windows.

    Returns:
        Map [B, C, s Ho, s Wo], contiguous, in the dtype of `x`.
    """
    _, scale = kernel_sides(kernels)
    height, width = (extent * scale for extent in kernels.shape[-2:])
    out = x.new_empty(*x.shape[:2], height, width)
    padded = _pad(x, kernels)
    for tiles, band in _chunks(x, kernels, stride):
        patches = tiles.patches_of(padded).reshape(tiles.count, x.shape[1], -1)
        target = tiles.outputs_of(out)
        target.copy_((patches @ band).view(target.shape))  # [T, C, N]
    return out


def banded_backward(
    grad_out: Tensor, x: Tensor, kernels: Tensor, stride: int, for_x: bool, for_kernels: bool
) -> list[Tensor]:
    """Gradients of both arguments, each only where it is asked for.

    Args:
        grad_out: [B, C, s Ho, s Wo].
        x: As in `banded_forward`.
        kernels: As in `banded_forward`.
        stride: As in `banded_forward`.
        for_x: Whether the gradient of `x` is wanted.
        for_kernels: Whether that of the kernels is.

    Returns:
        Those asked for, in this order, each in the dtype of its argument; see `empty_gradients`.
    """
    channels = x.shape[1]
    padded = _pad(x, kernels) if for_kernels else None
    grad_kernels = kernels.new_empty(kernels.shape) if for_kernels else None
    grad_padded = _empty_padded(x, kernels).zero_() if for_x else None
    for tiles, band in _chunks(x, kernels, stride):
        grads = tiles.outputs_of(grad_out).to(band.dtype)
        grads = grads.reshape(tiles.count, channels, -1)  # [T, C, N]
        if padded is not None and grad_kernels is not None:
            patches = tiles.patches_of(padded).reshape(tiles.count, channels, -1)
            grad_band = patches.transpose(1, 2) @ grads  # [T, K, N]
            tiles.kernels_of(grad_kernels).copy_(tiles.taps_of(grad_band))
        if grad_padded is not None:
            _add_patches(tiles, grad_padded, grads @ band.transpose(1, 2))  # [T, C, K]
    found = [] if grad_padded is None else [_without_margin(grad_padded, x)]
    return found if grad_kernels is None else [*found, grad_kernels]


def empty_gradients(x: Tensor, kernels: Tensor, for_x: bool, for_kernels: bool) -> list[Tensor]:
    """What `banded_backward` returns, without its values: for compilers.

    The gradient of `x` is a view of a padded map: copying it would cost a tenth of the time.

    Args:
        x: As in `banded_forward`.
        kernels: As in `banded_forward`.
        for_x: Whether the gradient of `x` is wanted.
        for_kernels: Whether that of the kernels is.

    Returns:
        Tensors of the same shapes, strides and dtypes.
    """
    found = [_without_margin(_empty_padded(x, kernels), x)] if for_x else []
    return [*found, kernels.new_empty(kernels.shape)] if for_kernels else found


def _pad(x: Tensor, kernels: Tensor) -> Tensor:
    """Zero margin of k // 2, contiguous, in at least float32."""
    margin = kernel_sides(kernels)[0] // 2
    return F.pad(widen(x), [margin] * 4).contiguous()


def _empty_padded(x: Tensor, kernels: Tensor) -> Tensor:
    """Uninitialised map of the shape and dtype that `_pad` gives."""
    margin = kernel_sides(kernels)[0] // 2
    height, width = (extent + 2 * margin for extent in x.shape[2:])
    return x.new_empty(*x.shape[:2], height, width, dtype=widened_dtype(x.dtype))


def _without_margin(padded: Tensor, x: Tensor) -> Tensor:
    """Undo `_pad`: a view in the shape of `x`, or a copy in its dtype."""
    height, width = x.shape[2:]
    top, left = (padded.shape[2] - height) // 2, (padded.shape[3] - width) // 2
    return padded[..., top : top + height, left : left + width].to(x.dtype)


def _add_patches(tiles: Tiles, padded: Tensor, patches: Tensor) -> None:
    """Add patches [T, C, K] into a padded map; those that overlap go in one after the other."""
    target = tiles.patches_of(padded)
    source = patches.view(target.shape)
    for part in tiles.disjoint_parts():
        target[:, *part].add_(source[:, *part])
