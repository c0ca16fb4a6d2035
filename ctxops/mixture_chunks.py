"""Mixture-of-softmaxes attention in chunks of queries: the eager CPU path of `attention`.

A fused attention kernel treats the N parts as heads and multiplies the weights of each with the
values, N products where one would do: the parts share the values, so that their weights can be
mixed first. That needs whole rows of weights, and rows are what is taken here: a chunk of queries,
all keys, one part after the other. Only a few buffers of chunk x K numbers exist at a time. The
backward pass keeps nothing but the arguments and computes the weights again.

With P_n the weights of part n, W = sum_n pi_n P_n, O = W v and dW = dO v^T:

    dv += W^T dO,  r_n(i) = sum_j P_n(i, j) dW(i, j),  dpi_n = sum_i r_n(i),
    D_n = P_n (dW - r_n),  dq_n = pi_n D_n k_n,  dk_n = pi_n D_n^T q_n,  dbias_n = pi_n sum_i D_n

Letters: B batch, N parts, Q queries, K keys, d width of a part, V width of the values.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ctxops.precision import autocast_off
from ctxops.products import product

# Bytes of one buffer, by measurement, but never fewer rows than a product needs to be fast.
CHUNK_BYTES_CPU = 2**23
CHUNK_BYTES_ACCELERATOR = 2**28
MIN_ROWS = 64


class MixtureChunks(torch.autograd.Function):
    """out = sum_n pi_n softmax(q_n k_n + bias_n) v, for arguments of one dtype."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, bias: Tensor | None, value: Tensor, mixture: Tensor
    ) -> Tensor:
        """[B, N, Q, d], [B, N, d, K], [B, N, K] or None, [B, K, V], [B, N] -> [B, Q, V]."""
        ctx.save_for_backward(query, key, bias, value, mixture)
        out = value.new_empty(value.shape[0], query.shape[2], value.shape[2])
        # W v = sum(pi) c + W (v - c) for any c, since rows of P_n sum to 1; less is left to round.
        centre = value.mean(1, keepdim=True)
        centred = value - centre
        centre = centre * mixture.sum(1)[:, None, None]
        with autocast_off(query):
            for image, rows in _chunks(query, key):
                mixed = query.new_zeros(rows.stop - rows.start, key.shape[3])
                for part in range(query.shape[1]):
                    weights = _part_weights(query, key, bias, image, part, rows)
                    mixed.addcmul_(weights, mixture[image, part])
                # Not `product`: oneDNN adds so many terms in one chain and rounds twice as badly.
                torch.add(mixed @ centred[image], centre[image], out=out[image, rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the arguments."""
        query, key, bias, value, mixture = ctx.saved_tensors
        grad_value = torch.zeros_like(value.transpose(1, 2), memory_format=torch.contiguous_format)
        sums = _Sums(
            query=torch.empty_like(query),
            key=torch.zeros_like(key),
            bias=None if bias is None else torch.zeros_like(bias),
            mixture=torch.zeros_like(mixture),
        )
        with autocast_off(query):
            for image, rows in _chunks(query, key):
                grad_rows = grad_out[image, rows]
                grad_mixed = product(grad_rows, value[image].t())  # [chunk, K]
                mixed, scratch = torch.zeros_like(grad_mixed), torch.empty_like(grad_mixed)
                for part in range(query.shape[1]):
                    weights = _part_weights(query, key, bias, image, part, rows)
                    mixed.addcmul_(weights, mixture[image, part])
                    sums.add(query, key, (image, part), rows, weights, grad_mixed, scratch)
                grad_value[image] += product(grad_rows.t(), mixed)
        # Scaling the sums by pi, not every gradient of logits.
        for grad in (sums.query, sums.key, sums.bias):
            if grad is not None:
                grad *= mixture.view(*mixture.shape, *[1] * (grad.dim() - 2))
        return sums.query, sums.key, sums.bias, grad_value.transpose(1, 2), sums.mixture


@dataclass(kw_only=True)
class _Sums:
    """Gradients that grow chunk by chunk; those of query, key and bias still without pi."""

    query: Tensor
    key: Tensor
    bias: Tensor | None
    mixture: Tensor

    def add(
        self,
        query: Tensor,
        key: Tensor,
        place: tuple[int, int],
        rows: slice,
        weights: Tensor,
        grad_mixed: Tensor,
        scratch: Tensor,
    ) -> None:
        """Add what one part of a chunk contributes: P_n and dW [chunk, K], and room for D_n."""
        row_sums = torch.mul(weights, grad_mixed, out=scratch).sum(1, keepdim=True)
        self.mixture[place] += row_sums.sum()
        grad_logits = scratch.addcmul_(weights, row_sums, value=-1)
        self.query[place][rows] = product(grad_logits, key[place].t())
        self.key[place] += product(query[place][rows].t(), grad_logits)
        if self.bias is not None:
            self.bias[place] += grad_logits.sum(0)


def _part_weights(
    query: Tensor, key: Tensor, bias: Tensor | None, image: int, part: int, rows: slice
) -> Tensor:
    """P_n of some rows [chunk, K]."""
    shift = None if bias is None else bias[image, part]
    logits = product(query[image, part, rows], key[image, part], shift)
    return torch.softmax(logits, 1, out=logits)


def _chunks(query: Tensor, key: Tensor) -> Iterator[tuple[int, slice]]:
    """(image, queries), in equal chunks of bounded size."""
    on_cpu = query.device.type == "cpu"
    budget = CHUNK_BYTES_CPU if on_cpu else CHUNK_BYTES_ACCELERATOR
    queries = query.shape[2]
    limit = max(MIN_ROWS, budget // (key.shape[3] * query.dtype.itemsize))
    number = -(-queries // limit)
    rows = -(-queries // number)
    for image in range(query.shape[0]):
        for start in range(0, queries, rows):
            yield image, slice(start, min(start + rows, queries))
