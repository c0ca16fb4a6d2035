"""Self-attention of many tokens in chunks: the eager float32 path of the CPU.

PyTorch's fused attention of the CPU calls MKL (see `products`), and with dropout it materialises
all weights, several times. Here weights exist for one head and one chunk at a time, just large
enough for the cache: all keys of some queries in the forward pass, all queries of some keys in the
backward pass, so that sums are whole and need no second look. The backward pass keeps the
arguments, the output and one number per row, and computes the weights again.

With S = scale log2(e) Q K^T, l = log2(sum_j 2^S), P = 2^(S - l) the weights (of base 2, which is
the faster one), M what dropout multiplies them with, O = (P M) V:

    dV = (P M)^T dO,  D = P (M (dO V^T) - sum(dO O)),  dQ = scale D K,  dK = scale D^T Q

Letters: B batch, N tokens, h heads, d width of a head.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product as pairs
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ctxops.products import is_plain_float32, product

CHUNK_BYTES = 2**21  # of the weights of a chunk, by measurement
MIN_TOKENS = 256  # with fewer, calling costs more than there is to win


def takes_chunks(qkv: Tensor) -> bool:
    """Whether `chunked_attention` is the faster way.

    Args:
        qkv: [B, N, 3, h, d].

    Returns:
        The answer; never inside torch.compile or torch.export.
    """
    return is_plain_float32(qkv) and qkv.shape[1] >= MIN_TOKENS


def chunked_attention(qkv: Tensor, *, dropout_p: float = 0.0) -> Tensor:
    """softmax(q kT / sqrt(d)) v of every head; no second derivatives.

    Args:
        qkv: Queries, keys and values side by side, [B, N, 3, h, d].
        dropout_p: Probability of dropping a weight.

    Returns:
        [B, N, h, d].
    """
    # One number of the global generator, so that what is drawn can be drawn again.
    seed = int(torch.randint(2**63 - 1, ())) if dropout_p else 0
    out: Tensor = _Chunks.apply(qkv, dropout_p, seed)
    return out


class _Chunks(torch.autograd.Function):
    """All heads of all images."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, dropout_p: float, seed: int) -> Tensor:
        """[B, N, 3, h, d] -> [B, N, h, d]."""
        batch, tokens, _, heads, width = qkv.shape
        out = qkv.new_empty(batch, tokens, heads, width)
        log_sums = qkv.new_empty(batch, heads, tokens)  # l
        dropout = _Dropout(dropout_p, seed)
        for image, number in pairs(range(batch), range(heads)):
            head = _head(qkv, image, number)
            for rows in _chunks(tokens):
                part = head.attend(rows, dropout)
                out[image, rows, number], log_sums[image, number, rows] = part
        ctx.save_for_backward(qkv, out, log_sums)
        ctx.dropout_p, ctx.seed = dropout_p, seed
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of `qkv`, written part by part."""
        qkv, out, log_sums = ctx.saved_tensors
        grad = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        dropout = _Dropout(ctx.dropout_p, ctx.seed)
        for image, number in pairs(range(qkv.shape[0]), range(qkv.shape[3])):
            head = _head(qkv, image, number)
            grad_head = grad_out[image, :, number].contiguous()
            row_sums = (grad_head * out[image, :, number]).sum(1)
            shifts = log_sums[image, number], row_sums
            head.write_gradients(grad_head, *shifts, dropout, grad[image, :, :, number])
        return grad, None, None


class _Dropout:
    """Masks that depend on the seed and on the order of the calls alone."""

    def __init__(self, dropout_p: float, seed: int) -> None:
        self.dropout_p = dropout_p
        self.scale = 1 / (1 - dropout_p)
        self._generator = torch.Generator().manual_seed(seed)

    def kept(self, queries: int, keys: int) -> Tensor:
        """True where a weight stays, [queries, keys]."""
        return torch.rand(queries, keys, generator=self._generator) >= self.dropout_p

    def kept_by_key(self, tokens: int) -> Tensor:
        """The same for all queries of a head, [keys, queries]."""
        parts = [self.kept(rows.stop - rows.start, tokens) for rows in _chunks(tokens)]
        return torch.cat(parts).t().contiguous()


@dataclass(kw_only=True)
class _Head:
    """One head of one image; query (times `scale` log2(e)), key and value, contiguous [N, d]."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float

    def attend(self, rows: slice, dropout: _Dropout) -> tuple[Tensor, Tensor]:
        """O [chunk, d] and l [chunk] of some queries."""
        logits = product(self.query[rows], self.key.t())  # [chunk, N]
        largest = logits.amax(1, keepdim=True)
        weights = logits.sub_(largest).exp2_()
        sums = weights.sum(1, keepdim=True)
        if dropout.dropout_p:
            weights *= dropout.kept(*weights.shape)
        out = product(weights, self.value) * (dropout.scale / sums)
        return out, (largest + sums.log2())[:, 0]

    def write_gradients(
        self, grad_out: Tensor, log_sums: Tensor, row_sums: Tensor, dropout: _Dropout, grad: Tensor
    ) -> None:
        """From dO [N, d], l [N] and sum(dO O) [N] to the gradient [N, 3, d] of this head."""
        tokens = len(self.key)
        kept = dropout.kept_by_key(tokens) if dropout.dropout_p else None
        grad_out = grad_out * dropout.scale if dropout.dropout_p else grad_out
        grad_query = torch.zeros_like(self.key.t(), memory_format=torch.contiguous_format)
        for rows in _chunks(tokens):
            weights = product(self.key[rows], self.query.t(), -log_sums).exp2_()  # [chunk, N]
            if kept is None:
                grad_weights = product(self.value[rows], grad_out.t(), -row_sums)
                dropped = weights
            else:
                grad_weights = product(self.value[rows], grad_out.t()).mul_(kept[rows])
                grad_weights -= row_sums
                dropped = weights * kept[rows]
            grad[rows, 2] = product(dropped, grad_out)
            grad_logits = grad_weights.mul_(weights)  # the transpose of D
            # The query holds log2(e) too much.
            grad[rows, 1] = product(grad_logits, self.query) * math.log(2)
            grad_query += product(self.key[rows].t(), grad_logits)
        grad[:, 0] = (grad_query * self.scale).t()


def _head(qkv: Tensor, image: int, number: int) -> _Head:
    query, key, value = (qkv[image, :, part, number].contiguous() for part in range(3))
    scale = qkv.shape[-1] ** -0.5
    return _Head(query=query * (scale / math.log(2)), key=key, value=value, scale=scale)


def _chunks(tokens: int) -> Iterator[slice]:
    """Queries, or keys, in equal chunks of about `CHUNK_BYTES`."""
    number = min(tokens, max(1, round(4 * tokens**2 / CHUNK_BYTES)))
    rows = -(-tokens // number)
    return (slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows))
