"""Recurrent criss-cross attention, RCCA ("CCNet: Criss-Cross Attention"), in plain PyTorch.

Letters: B batch, C channels, d width of queries and keys, H W map.
"""

import torch
from torch import Tensor, nn

from ctxops.checks import check_divides, check_map, check_positive
from ctxops.init import fan_in_uniform_
from ctxops.precision import autocast_off, widen


def criss_cross_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """For every position the mean of the values in its row and its column (Eqs. 1, 2).

    Softmax over the H + W - 1 positions: the centre lies in both and is taken once. Memory
    O(HW (H + W)), in at least float32, also under autocast.

    Args:
        query: Map [B, d, H, W].
        key: Map [B, d, H, W].
        value: Map [B, C, H, W].

    Returns:
        Map [B, C, H, W] in the dtype of `value`.
    """
    height, width = query.shape[2:]
    with autocast_off(query):
        q, k, v = widen(query), widen(key), widen(value)
        row = torch.einsum("bdhw,bdhx->bhwx", q, k)
        column = torch.einsum("bdhw,bdyw->bhwy", q, k)
        centre = torch.eye(height, dtype=torch.bool, device=q.device)[:, None]  # [H, 1, H]
        logits = torch.cat([row, column.masked_fill(centre, -torch.inf)], dim=3)
        row, column = logits.softmax(3).split([width, height], dim=3)
        out = torch.einsum("bhwx,bchx->bchw", row, v) + torch.einsum("bhwy,bcyw->bchw", column, v)
    return out.to(value.dtype)


class RecurrentCrissCross(nn.Module):
    """x <- x + gamma * criss_cross_attention(theta(x), phi(x), g(x)), R times, shared weights.

    After two rounds every position has seen all others. gamma (in the authors' code, not in the
    paper) starts at 0: the identity.

    Args:
        in_channels: C.
        reduction: C / d, a divisor of C.
        num_recurrences: R.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is not positive or `reduction` no divisor of C.
    """

    def __init__(self, *, in_channels: int, reduction: int = 8, num_recurrences: int = 2) -> None:
        super().__init__()
        check_positive(in_channels, "in_channels")
        check_positive(reduction, "reduction")
        check_positive(num_recurrences, "num_recurrences")
        check_divides(reduction, in_channels, "reduction and in_channels")
        width = in_channels // reduction
        self.in_channels = in_channels
        self.num_recurrences = num_recurrences
        self.query = fan_in_uniform_(nn.Conv2d(in_channels, width, 1))
        self.key = fan_in_uniform_(nn.Conv2d(in_channels, width, 1))
        self.value = fan_in_uniform_(nn.Conv2d(in_channels, in_channels, 1))
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Let every position see its row and column, then all.

        Args:
            x: Map [B, C, H, W].

        Returns:
            Map [B, C, H, W], in the dtype of `x`.

        Raises:
            TypeError: If `x` is not floating point.
            ValueError: If `x` is not [B, C, H, W] with the C of the module.
        """
        check_map(x, "x", channels=self.in_channels)
        for _ in range(self.num_recurrences):
            received = criss_cross_attention(self.query(x), self.key(x), self.value(x))
            x = x + (self.gamma * received).to(x.dtype)
        return x
