"""Mixture-of-softmaxes attention in a window around every pixel (FPT, locality-constrained GT).

The query at (y, x) attends to the w x w keys centred on (y, x) of a second map of the same size.
Outside that map there are zero keys with zero values, and they take part in the softmax:

    w_o = sum_n pi_n softmax_o(scale * sim(q_n(y, x), k_n((y, x) + o))),
    out(y, x) = sum_o w_o v((y, x) + o)

with sim as in `attention`. The zero keys are fixed points, so that nothing is centred here.

The same numbers three ways:

- `unfold`: the definition, every window materialised. The reference, and the hungry one.
- `loop`: offset by offset on views, under autograd. Traceable.
- `chunked`: tiles of queries as batched matrix products, with a backward pass of its own, working
  memory of bounded size and nothing kept but padded arguments (see `local_tiles`). No second
  derivatives. A non-finite value or key spreads over its tile instead of its window only.
- `auto`: `chunked`.

With dropout, and inside a torch.compile or torch.export of the caller, `chunked` is `loop`.

Letters: B batch, D width of queries and keys, H W map, N parts, d = D / N, V width of the values,
w window, o offset in the window, O = w^2.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ctxops.attention import SIMILARITIES, check_mixture
from ctxops.checks import check_choice, check_map, check_odd, check_probability
from ctxops.local_tiles import LocalTiles, tile_size
from ctxops.precision import autocast_off, widened_dtype
from ctxops.resize import crop

IMPLS = ("auto", "chunked", "loop", "unfold")


def local_mixture_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixture: Tensor,
    *,
    window: int,
    similarity: str,
    scale: float,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Values of a window averaged with a mixture of N softmaxes; see the head of this file.

    The whole computation is in at least float32 under autocast.

    Args:
        query: Map [B, D, H, W].
        key: Map [B, D, H, W].
        value: Map [B, V, H, W].
        mixture: pi [B, N], sums to 1 over N; N divides D. See `attention.mixture_weights`.
        window: w, odd.
        similarity: `dot` or `euclidean`.
        scale: Factor of every logit.
        dropout_p: Probability of dropping a weight of a part, before mixing. The caller passes 0
            in evaluation mode.
        impl: See the head of this file.

    Returns:
        Map [B, V, H, W], in the dtype of `value`.

    Raises:
        TypeError: If an argument is not a floating point tensor, or `window` no integer.
        ValueError: If the maps are not of one size, the other shapes do not fit, the window is
            even, a name is unknown, or `dropout_p` is no probability.
    """
    check_choice(similarity, "similarity", SIMILARITIES)
    check_choice(impl, "impl", IMPLS)
    check_odd(window, "window")
    check_probability(dropout_p, "dropout_p")
    _check_maps(query, key, value)
    check_mixture(mixture, batch=query.shape[0], width=query.shape[1])
    euclidean = similarity == "euclidean"
    dtype = widened_dtype(query.dtype)
    with autocast_off(query):
        q, k, v, pi = (x.to(dtype) for x in (query, key, value, mixture))
        if impl == "unfold":
            out = _unfold(q, k, v, pi, window, euclidean, scale, dropout_p)
        elif impl == "loop" or dropout_p > 0 or torch.compiler.is_compiling():
            out = _loop(q, k, v, pi, window, euclidean, scale, dropout_p)
        else:
            out = _tiled(q, k, v, pi, window, euclidean, scale)
    return out.to(value.dtype)


def _check_maps(query: Tensor, key: Tensor, value: Tensor) -> None:
    check_map(query, "query")
    check_map(key, "key", channels=query.shape[1])
    check_map(value, "value")
    sizes = [(x.shape[0], *x.shape[2:]) for x in (query, key, value)]
    if sizes[1:] != sizes[:-1]:
        raise ValueError(
            "local attention: expected query, key and value of one batch and map size, got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}; the window form "
            "needs levels of equal size, use the global one or resize"
        )


def _unfold(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixture: Tensor,
    window: int,
    euclidean: bool,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """The definition, with the window of every pixel materialised."""
    q = _as_parts(query, mixture)[:, :, :, None]  # [B, N, d, 1, H, W]
    k = _as_parts(_windows(key, window), mixture)  # [B, N, d, O, H, W]
    similarity = -(q - k).square().sum(2) if euclidean else (q * k).sum(2)  # [B, N, O, H, W]
    weights = F.dropout((scale * similarity).softmax(2), dropout_p)
    mixed = (mixture[:, :, None, None, None] * weights).sum(1, keepdim=True)  # [B, 1, O, H, W]
    return (mixed * _windows(value, window)).sum(2)


def _windows(x: Tensor, window: int) -> Tensor:
    """[B, C, H, W] -> [B, C, O, H, W], with zeros outside the map."""
    columns = F.unfold(x, window, padding=window // 2)
    return columns.view(*x.shape[:2], window**2, *x.shape[2:])


def _loop(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixture: Tensor,
    window: int,
    euclidean: bool,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """Offset by offset. -|q|^2 is the same for all keys of a window and left out."""
    q = scale * _as_parts(query, mixture)  # [B, N, d, H, W]
    padded = F.pad(_as_parts(key, mixture), [window // 2] * 4)
    if euclidean:
        q = 2 * q
        norms = scale * padded.square().sum(2)  # [B, N, H + w - 1, W + w - 1]
    size = query.shape[2:]
    logits = []
    for rows, columns in _offsets(window, size):
        logit = (q * padded[..., rows, columns]).sum(2)  # [B, N, H, W]
        logits.append(logit - norms[..., rows, columns] if euclidean else logit)
    weights = F.dropout(torch.stack(logits).softmax(0), dropout_p)  # [O, B, N, H, W]
    mixed = (mixture[:, :, None, None] * weights).sum(2)[:, :, None]  # [O, B, 1, H, W]
    values = F.pad(value, [window // 2] * 4)
    out = torch.zeros_like(value)
    for index, (rows, columns) in enumerate(_offsets(window, size)):
        out = out + mixed[index] * values[..., rows, columns]
    return out


def _tiled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixture: Tensor,
    window: int,
    euclidean: bool,
    scale: float,
) -> Tensor:
    """Maps filled up to whole tiles with queries that nobody asked for; the rest under autograd."""
    height, width = query.shape[2:]
    tile = tile_size(height, width)
    bottom, right = -height % tile[0], -width % tile[1]
    margin = window // 2
    around = [margin, margin + right, margin, margin + bottom]
    queries = F.pad((2 * scale if euclidean else scale) * query, [0, right, 0, bottom])
    keys, values = F.pad(key, around).contiguous(), F.pad(value, around).contiguous()
    biases = -scale * _as_parts(keys, mixture).square().sum(2) if euclidean else None
    out: Tensor = LocalTiles.apply(queries, keys, biases, values, mixture, tile)
    return crop(out, (height, width))


def _offsets(window: int, size: torch.Size) -> Iterator[tuple[slice, slice]]:
    """The part of a padded map that lies under every pixel's o-th window position, row-major."""
    for offset in range(window**2):
        dy, dx = divmod(offset, window)
        yield slice(dy, dy + size[0]), slice(dx, dx + size[1])


def _as_parts(x: Tensor, mixture: Tensor) -> Tensor:
    """[B, D, ...] -> [B, N, d, ...]."""
    return x.unflatten(1, (mixture.shape[1], -1))
