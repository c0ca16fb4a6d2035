"""Mixture-of-softmaxes attention in a window, tile by tile: the eager path of `local_attention`.

The windows of neighbouring queries overlap: a tile of r x c queries sees a patch of only
(r + w - 1) x (c + w - 1) keys. Every query of a tile attends to its whole patch, with a mask that
leaves the w^2 keys of its window. That multiplies several times as many numbers as needed, as
batched matrix products on data in cache, and is still far faster than going through the offsets.
Tiles are taken in chunks of bounded size; the backward pass keeps nothing but the arguments and
computes the weights again, with the formulas of `mixture_chunks`.

Letters: B batch, N parts, d width of a part, V width of the values, H W map, w window,
T tiles, R = r c queries of a tile, P keys of a patch.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ctxops.precision import autocast_off
from ctxops.tiling import Tiles

# Queries of a tile, and bytes of the weights of a chunk of tiles, chosen by measurement.
TILE_HEIGHT, TILE_WIDTH = 4, 8
CHUNK_BYTES_CPU = 2**20
CHUNK_BYTES_ACCELERATOR = 2**26


def tile_size(height: int, width: int) -> tuple[int, int]:
    """Size of the tiles that cover a map with the least overhang.

    Args:
        height: H.
        width: W.

    Returns:
        (r, c), at most `TILE_HEIGHT` and `TILE_WIDTH`.
    """
    rows, columns = -(-height // TILE_HEIGHT), -(-width // TILE_WIDTH)
    return -(-height // rows), -(-width // columns)


class LocalTiles(torch.autograd.Function):
    """out = sum_n pi_n softmax over the window (q_n k_n + bias_n) v, for maps that tiles cover.

    The maps of keys, biases and values have a margin of w // 2 on all sides.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        value: Tensor,
        mixture: Tensor,
        tile: tuple[int, int],
    ) -> Tensor:
        """[B, N d, H, W], [B, N d, *], [B, N, *] or None, [B, V, *], [B, N] -> [B, V, H, W]."""
        ctx.save_for_backward(query, key, bias, value, mixture)
        ctx.tile = tile
        out = value.new_empty(*value.shape[:2], *query.shape[2:])
        with autocast_off(query):
            for tiles, mask in _chunks(query, key, mixture, tile):
                pi = _of_tiles(mixture, tiles)
                _, _, weights = _weights(tiles, query, key, bias, mask, mixture.shape[1])
                mixed = (weights * pi).sum(1)  # [T, R, P]
                target = tiles.outputs_of(out)
                target.copy_((_patches(tiles, value) @ mixed.mT).view(target.shape))  # [T, V, R]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the arguments."""
        query, key, bias, value, mixture = ctx.saved_tensors
        grad_query, grad_mixture = torch.empty_like(query), torch.zeros_like(mixture)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        with autocast_off(query):
            for tiles, mask in _chunks(query, key, mixture, ctx.tile):
                pi = _of_tiles(mixture, tiles)
                q, k, weights = _weights(tiles, query, key, bias, mask, mixture.shape[1])
                grads = tiles.outputs_of(grad_out).reshape(tiles.count, value.shape[1], -1)
                _add_patches(tiles, grad_value, grads @ (weights * pi).sum(1))  # [T, V, P]
                grad_mixed = grads.mT @ _patches(tiles, value)  # [T, R, P]
                grad_logits = weights * grad_mixed[:, None]
                row_sums = grad_logits.sum(-1, keepdim=True)  # [T, N, R, 1]
                _add_mixture(tiles, grad_mixture, row_sums)
                grad_logits.addcmul_(weights, row_sums, value=-1).mul_(pi)
                target = tiles.outputs_of(grad_query)
                target.copy_((k @ grad_logits.mT).view(target.shape))  # [T, N, d, R]
                _add_patches(tiles, grad_key, q @ grad_logits)  # [T, N, d, P]
                if grad_bias is not None:
                    _add_patches(tiles, grad_bias, grad_logits.sum(2))  # [T, N, P]
        return grad_query, grad_key, grad_bias, grad_value, grad_mixture, None


def _chunks(
    query: Tensor, key: Tensor, mixture: Tensor, tile: tuple[int, int]
) -> Iterator[tuple[Tiles, Tensor]]:
    """Chunks of bounded size with the mask [R, P] of their tiles: 0 in the window, else -inf."""
    window = key.shape[2] - query.shape[2] + 1
    tiles = Tiles(
        size=window,
        scale=1,
        stride=1,
        images=(0, query.shape[0]),
        top=0,
        left=0,
        rows=query.shape[2] // tile[0],
        columns=query.shape[3] // tile[1],
        height=tile[0],
        width=tile[1],
    )
    mask = _mask(tiles, query)
    on_cpu = query.device.type == "cpu"
    budget = CHUNK_BYTES_CPU * torch.get_num_threads() if on_cpu else CHUNK_BYTES_ACCELERATOR
    tile_bytes = mixture.shape[1] * mask.numel() * mask.element_size()
    for chunk in tiles.chunks(max(1, budget // tile_bytes)):
        yield chunk, mask


def _mask(tiles: Tiles, like: Tensor) -> Tensor:
    """Key (y, x) of a patch lies in the window of query (i, j) if 0 <= y - i, x - j < w."""
    inside = []
    for queries, keys in zip((tiles.height, tiles.width), tiles.patch, strict=True):
        offset = (
            torch.arange(keys, device=like.device)
            - torch.arange(queries, device=like.device)[:, None]
        )
        inside.append((offset >= 0) & (offset < tiles.size))  # [r, rows of the patch]
    both = inside[0][:, None, :, None] & inside[1][None, :, None, :]
    outside = both.logical_not().flatten(2).flatten(0, 1)  # [R, P]
    return torch.zeros_like(outside, dtype=like.dtype).masked_fill_(outside, -torch.inf)


def _weights(
    tiles: Tiles, query: Tensor, key: Tensor, bias: Tensor | None, mask: Tensor, parts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [T, N, d, R] and keys [T, N, d, P] of the parts, and weights P_n [T, N, R, P]."""
    q = tiles.outputs_of(query).reshape(tiles.count, parts, -1, mask.shape[0])
    k = _patches(tiles, key).unflatten(1, (parts, -1))
    logits = q.mT @ k
    logits += mask if bias is None else mask + _patches(tiles, bias)[:, :, None]
    return q, k, torch.softmax(logits, -1, out=logits)


def _patches(tiles: Tiles, padded: Tensor) -> Tensor:
    """What the tiles see of a padded map, [T, C, P]."""
    return tiles.patches_of(padded).reshape(tiles.count, padded.shape[1], -1)


def _add_patches(tiles: Tiles, padded: Tensor, patches: Tensor) -> None:
    """Add patches [T, ..., P] into a padded map; those that overlap go in one after the other."""
    target = tiles.patches_of(padded)
    source = patches.view(target.shape)
    for part in tiles.disjoint_parts():
        target[:, *part].add_(source[:, *part])


def _of_tiles(mixture: Tensor, tiles: Tiles) -> Tensor:
    """The pi of every tile's image, [T, N, 1, 1]."""
    images = mixture[slice(*tiles.images)]
    return images.repeat_interleave(tiles.rows * tiles.columns, 0)[:, :, None, None]


def _add_mixture(tiles: Tiles, grad_mixture: Tensor, row_sums: Tensor) -> None:
    """Add sums over the keys [T, N, R, 1] into the gradient of pi [B, N]."""
    first, last = tiles.images
    grad_mixture[first:last] += row_sums.unflatten(0, (last - first, -1)).sum((1, 3, 4))
