"""Linear layers that take the faster library on the CPU, and keep less for the backward pass.

What `nn.Linear` calls is MKL on x86, at half of what AMD processors can do (see `products`). In
float32 on a CPU, outside torch.compile and autocast, the three products of a layer go to oneDNN
here; anywhere else these functions are `F.linear`. Results differ by rounding.

Letters: m rows, k width of the input, n width of the output.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxops.products import is_plain_float32, product

# Multiplications below which calling costs more than there is to win.
MIN_MACS = 2**21


class Linear(nn.Linear):
    """`nn.Linear`, by the faster library; see the head of this file."""

    def forward(self, x: Tensor) -> Tensor:
        """Map the last axis.

        Args:
            x: [..., k].

        Returns:
            [..., n].
        """
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply by a matrix: x W^T + b.

    Args:
        x: [..., k].
        weight: W [n, k]; the transpose of a contiguous matrix is as good.
        bias: b [n], or None for none.

    Returns:
        [..., n].
    """
    if not _pays(x, weight):
        return F.linear(x, weight, bias)
    out: Tensor = _Linear.apply(x, weight, bias, False)
    return out


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Exact GELU, then the matrix: gelu(x) W^T + b, of which the backward pass keeps x alone.

    Args:
        x: [..., k].
        weight: W [n, k].
        bias: b [n], or None for none.

    Returns:
        [..., n].
    """
    if not _pays(x, weight):
        return F.linear(F.gelu(x), weight, bias)
    out: Tensor = _Linear.apply(x, weight, bias, True)
    return out


class _Linear(torch.autograd.Function):
    """Both of the above."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
        """[..., k], [n, k], [n] or None -> [..., n]."""
        ctx.save_for_backward(x, weight)
        ctx.gelu, ctx.has_bias = gelu, bias is not None
        rows = (F.gelu(x) if gelu else x).reshape(-1, x.shape[-1])  # [m, k]
        return product(rows, weight.t(), bias).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the arguments; differentiable again, then by the ordinary library."""
        x, weight = ctx.saved_tensors
        times = torch.matmul if torch.is_grad_enabled() else product
        grad = grad_out.reshape(-1, grad_out.shape[-1])  # [m, n]
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = times(grad, weight).view_as(x)
            if ctx.gelu:
                grad_x = torch.ops.aten.gelu_backward(grad_x, x)
        if ctx.needs_input_grad[1]:
            rows = (F.gelu(x) if ctx.gelu else x).reshape(-1, x.shape[-1])
            grad_weight = times(grad.t(), rows)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_x, grad_weight, grad_bias, None


def _pays(x: Tensor, weight: Tensor) -> bool:
    return is_plain_float32(x, weight) and x.numel() * weight.shape[0] >= MIN_MACS
