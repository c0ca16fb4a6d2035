"""Asymmetric pyramid non-local block, APNB ("Asymmetric Non-local Neural Networks", ANN).

Letters: B batch, C channels, H W map, N keys.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxops.checks import check_positive
from ctxops.heads.object_context import SharedKeyAttention


class PyramidSample(nn.Module):
    """A map averaged in grids of several sizes, all cells in one list.

    Args:
        sizes: Cells per side; the default gives 1 + 9 + 36 + 64 = 110.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If there is none, or one is not positive.
    """

    def __init__(self, *, sizes: Sequence[int] = (1, 3, 6, 8)) -> None:
        super().__init__()
        if not sizes:
            raise ValueError("sizes: expected at least one, got none; pass (1, 3, 6, 8)")
        for size in sizes:
            check_positive(size, "sizes")
        self.sizes = tuple(sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Average and list.

        Args:
            x: Map [B, C, H, W].

        Returns:
            [B, C, N], N the sum of the squared sizes.
        """
        return torch.cat([F.adaptive_avg_pool2d(x, size).flatten(2) for size in self.sizes], dim=2)


class AsymmetricNonLocal(nn.Module):
    """y = x + a(x), a(x) the `SharedKeyAttention` to the cells of a pyramid: cost linear in HW.

    Deviation: the paper concatenates a(x) and x and projects back; the sum has the parameters that
    the block needs by itself.

    Args:
        in_channels: C.
        reduction: C / width of queries, keys and values; a divisor of C.
        sizes: As in `PyramidSample`.
        norm: Norm of queries and keys, as in `make_norm`.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is not positive, `reduction` no divisor of C, or `norm` unknown.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        reduction: int = 2,
        sizes: Sequence[int] = (1, 3, 6, 8),
        norm: str = "BN",
    ) -> None:
        super().__init__()
        self.attention = SharedKeyAttention(
            in_channels=in_channels,
            reduction=reduction,
            norm=norm,
            sample=PyramidSample(sizes=sizes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Let every position see the cells of the pyramid.

        Args:
            x: Map [B, C, H, W].

        Returns:
            Map [B, C, H, W], in the dtype of `x`.

        Raises:
            TypeError: If `x` is not floating point.
            ValueError: If `x` is not [B, C, H, W] with the C of the module.
        """
        return x + self.attention(x).to(x.dtype)
