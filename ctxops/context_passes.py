"""Collecting and distributing context by hand-written passes: the float32 path of the CPU.

The definitions (Eqs. 1 and 6, see `context`) take the maps through 1x1 convolutions, a normalised
copy and PyTorch's fused attention, whose backward pass uses one thread per head. Here every step is
a product of matrices by the faster library (see `products`), and two convolutions move off the map,
because they commute with weighted means:

    (W_phi F + b) M^T = W_phi (F M^T) + b       for weights M that sum to 1 over the positions
    W_o (G~ A)        = (W_o G~) A

What is left for the map is the mean itself, F M^T, and A from a table W_o G~. Weights of attention
exist for one chunk of positions at a time, and are computed again in the backward pass. Results
differ from the definitions by rounding.

Letters: B batch, C channels of the map, c width of a context vector, D pyramid width, P positions,
n context vectors.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ctxops.products import product
from ctxops.similarity import NORM_EPS

CHUNK_BYTES = 2**22  # of the weights of a chunk, by measurement
CHUNK_MULTIPLE = 32  # positions: rows of matrices that start where vector registers do


class AttendedMeans(torch.autograd.Function):
    """Means of the pixels of a map, weighted by softmax_P(scale * W x / |x|) (inside of Eq. 1)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, scale: float) -> Tensor:
        """[B, C, P], W [n, C], bias [n] -> [B, C, n]; the bias cancels in the softmax."""
        logits = x.new_empty(x.shape[0], weight.shape[0], x.shape[2])
        means = x.new_empty(*x.shape[:2], weight.shape[0])
        for image, features in enumerate(x):
            torch.mul(product(weight, features), scale * _inverse_norm(features), out=logits[image])
            means[image] = product(features, logits[image].softmax(1).t())
        ctx.save_for_backward(x, weight, bias, logits)
        ctx.scale = scale
        return means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_means: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the map and of W."""
        x, weight, bias, logits = ctx.saved_tensors
        number = weight.shape[0]
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight)
        rows = x.new_empty(2 * number, x.shape[2])  # gradients of W x, weights
        for image, features in enumerate(x):
            weights = torch.softmax(logits[image], 1, out=rows[number:])
            grad_weights = product(grad_means[image].t(), features)  # [n, P]
            shift = (weights * grad_weights).sum(1, keepdim=True)
            grad_logits = grad_weights.sub_(shift).mul_(weights)
            inverse_norm = _inverse_norm(features)
            torch.mul(grad_logits, ctx.scale * inverse_norm, out=rows[:number])
            grad_weight += product(rows[:number], features.t())
            if grad_x is not None:
                columns = torch.cat([weight.t(), grad_means[image]], dim=1)  # [C, 2n]
                # Logits do not change with the length of a pixel: no gradient along the pixel.
                along = grad_logits.mul_(logits[image]).sum(0) * inverse_norm.square()
                grad_x[image] = product(columns, rows).addcmul_(features, along, value=-1)
        return grad_x, grad_weight, torch.zeros_like(bias), None


class Distribution(torch.autograd.Function):
    """U softmax_n(K Norm(W_theta x + b_theta)) + W_xi x + b (Eq. 6, U = W_o G~, K keys)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        keys: Tensor,
        table: Tensor,
        theta: Tensor,
        theta_bias: Tensor,
        xi: Tensor,
        bias: Tensor,
        normalize: bool,
    ) -> Tensor:
        """[B, C, P], [B, n, c], [B, D, n], [c, C], [c], [D, C], [D] -> [B, D, P]."""
        queries = x.new_empty(x.shape[0], theta.shape[0], x.shape[2])
        out = x.new_empty(x.shape[0], xi.shape[0], x.shape[2])
        for image, features in enumerate(x):
            torch.add(product(theta, features), theta_bias[:, None], out=queries[image])
            torch.add(product(xi, features), bias[:, None], out=out[image])
            for part in _chunks(x.shape[2], keys.shape[1]):
                unit, _ = _unit(queries[image, :, part], normalize)
                weights = _weights(unit, keys[image])
                out[image, :, part] += product(table[image], weights.t())
        ctx.save_for_backward(x, keys, table, theta, xi, queries)
        ctx.normalize = normalize
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of all tensors."""
        x, keys, table, theta, xi, queries = ctx.saved_tensors
        width = theta.shape[0]
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_keys, grad_table = torch.zeros_like(keys), torch.zeros_like(table)
        layers = torch.cat([theta, xi])  # [c + D, C]
        grad_layers = torch.zeros_like(layers)
        grad_biases = layers.new_zeros(len(layers))
        rows = x.new_empty(len(layers), x.shape[2])  # gradients of theta x, gradients of xi x
        for image, features in enumerate(x):
            rows[width:] = grad_out[image]
            for part in _chunks(x.shape[2], keys.shape[1]):
                unit, inverse_norm = _unit(queries[image, :, part], ctx.normalize)
                grad_unit, for_keys, for_table = _attention_gradients(
                    rows[width:, part], unit, keys[image], table[image]
                )
                grad_keys[image] += for_keys
                grad_table[image] += for_table
                if inverse_norm is not None:
                    grad_unit.addcmul_(unit, (unit * grad_unit).sum(0), value=-1).mul_(inverse_norm)
                rows[:width, part] = grad_unit
            grad_layers += product(rows, features.t())
            grad_biases += rows.sum(1)
            if grad_x is not None:
                grad_x[image] = product(layers.t(), rows)
        for_theta, for_xi = grad_layers.split([width, len(xi)])
        biases = grad_biases.split([width, len(xi)])
        return grad_x, grad_keys, grad_table, for_theta, biases[0], for_xi, biases[1], None


def _attention_gradients(
    grad_out: Tensor, unit: Tensor, keys: Tensor, table: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of unit [c, p], keys [n, c] and table [D, n], from that of their result [D, p]."""
    weights = _weights(unit, keys)
    grad_table = product(grad_out, weights)
    grad_logits = product(grad_out.t(), table)  # [p, n]
    grad_logits -= (grad_logits * weights).sum(1, keepdim=True)
    grad_logits *= weights
    grad_keys = product(unit, grad_logits).t()
    return product(keys.t(), grad_logits.t()), grad_keys, grad_table


def _weights(unit: Tensor, keys: Tensor) -> Tensor:
    """softmax_n(unit^T keys^T) for unit [c, p] and keys [n, c], [p, n]."""
    logits = product(unit.t(), keys.t())
    return torch.softmax(logits, 1, out=logits)


def _unit(vectors: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """Unit vectors and inverse norms of [c, p], or the vectors themselves and None."""
    if not normalize:
        return vectors.contiguous(), None
    inverse_norm = _inverse_norm(vectors)
    return vectors * inverse_norm, inverse_norm


def _inverse_norm(x: Tensor) -> Tensor:
    """1 / |x| of every column of [C, P]; zero vectors have none, see `NORM_EPS`."""
    # Six times as fast as torch.linalg.vector_norm along this axis.
    return torch.linalg.vecdot(x, x, dim=0).sqrt_().clamp_min_(NORM_EPS).reciprocal_()


def _chunks(positions: int, contexts: int) -> Iterator[slice]:
    """Positions in nearly equal chunks of bounded size."""
    limit = max(1, CHUNK_BYTES // (4 * contexts))
    size = -(-positions // -(-positions // limit))
    size += -size % CHUNK_MULTIPLE
    return (slice(start, min(start + size, positions)) for start in range(0, positions, size))
