"""Dropout of single elements that keeps little for the backward pass.

PyTorch's dropout keeps a mask as wide as the numbers on a CPU, and behind a ReLU the ReLU's result,
too. Both follow from the result where something is left of it; only the result is kept here, which
the next layer keeps anyway.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ctxops.checks import check_probability


def dropout(x: Tensor, p: float, *, training: bool) -> Tensor:
    """Set elements to zero with probability p, and scale the others by 1 / (1 - p).

    Args:
        x: Any shape.
        p: Probability in [0, 1).
        training: False returns `x`.

    Returns:
        The same shape. On a CPU the backward pass keeps one byte per element.

    Raises:
        ValueError: If `p` is no probability.
    """
    check_probability(p, "p")
    if not training or p == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    return torch.native_dropout(x, p, True)[0]


def relu_dropout(x: Tensor, p: float, *, training: bool) -> Tensor:
    """Dropout of max(x, 0), by the same draw as PyTorch's dropout.

    Args:
        x: Any shape.
        p: Probability in [0, 1).
        training: False drops nothing.

    Returns:
        The same shape. The backward pass keeps nothing but the result.

    Raises:
        ValueError: If `p` is no probability.
    """
    check_probability(p, "p")
    if not training or p == 0:
        return x.relu()
    if torch.compiler.is_compiling():
        return F.dropout(x.relu(), p)
    out: Tensor = _ReluDropout.apply(x, p)
    return out


class _ReluDropout(torch.autograd.Function):
    """What is positive in the result has passed both, and has been scaled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        """Any shape -> the same."""
        out = F.dropout(x.relu(), p, inplace=True)
        ctx.save_for_backward(out)
        ctx.p = p
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None]:
        """Gradient of x; differentiable in `grad_out`."""
        (out,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(grad_out, out, 0) / (1 - ctx.p), None
