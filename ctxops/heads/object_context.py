"""Object context, base-OC ("OCNet: Object Context Network for Scene Parsing").

Letters: B batch, C channels, H W map, N keys, d width of queries, keys and values.
"""

import torch
from torch import Tensor, nn

from ctxops.checks import check_divides, check_map, check_positive, check_probability
from ctxops.heads.non_local import attend_positions
from ctxops.init import fan_in_uniform_
from ctxops.norm import ConvNorm


class SharedKeyAttention(nn.Module):
    """W_o softmax(f(x)^T s(f(x)) / sqrt(d)) s(g(x)), one projection f for queries and keys.

    W_o starts at 0. What s keeps of a map as keys and values is a part that is passed in.

    Args:
        in_channels: C.
        reduction: C / d, a divisor of C.
        norm: Norm inside f, as in `make_norm`; a ReLU follows.
        sample: s, [B, d, H, W] -> [B, d, N]; None for all positions.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is not positive, `reduction` no divisor of C, or `norm` unknown.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        reduction: int = 2,
        norm: str = "BN",
        sample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_positive(in_channels, "in_channels")
        check_positive(reduction, "reduction")
        check_divides(reduction, in_channels, "reduction and in_channels")
        width = in_channels // reduction
        self.in_channels = in_channels
        self.scale = width**-0.5
        self.key = ConvNorm(
            in_channels=in_channels, out_channels=width, kernel_size=1, norm=norm, bias=True
        )
        self.value = fan_in_uniform_(nn.Conv2d(in_channels, width, 1))
        self.sample = nn.Flatten(2) if sample is None else sample
        self.out = nn.Conv2d(width, in_channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:
        """Context of every position.

        Args:
            x: Map [B, C, H, W].

        Returns:
            Map [B, C, H, W].

        Raises:
            TypeError: If `x` is not floating point.
            ValueError: If `x` is not [B, C, H, W] with the C of the module.
        """
        check_map(x, "x", channels=self.in_channels)
        query = self.key(x)
        keys, values = self.sample(query), self.sample(self.value(x))  # [B, d, N]
        return self.out(attend_positions(query, keys, values, scale=self.scale))


class ObjectContext(nn.Module):
    """y = ReLU(N(W [a(x), x])), a(x) the `SharedKeyAttention` over all positions (base-OC).

    Args:
        in_channels: C.
        out_channels: C'; None for C.
        reduction: C / d, a divisor of C.
        norm: Every norm, as in `make_norm`.
        dropout: Probability of dropping a channel of the output in training.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is not positive, `reduction` no divisor of C, `norm` unknown, or
            `dropout` no probability.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int | None = None,
        reduction: int = 2,
        norm: str = "BN",
        dropout: float = 0.05,
    ) -> None:
        super().__init__()
        check_probability(dropout, "dropout")
        self.attention = SharedKeyAttention(in_channels=in_channels, reduction=reduction, norm=norm)
        self.fuse = ConvNorm(
            in_channels=2 * in_channels,
            out_channels=in_channels if out_channels is None else out_channels,
            kernel_size=1,
            norm=norm,
            bias=True,
        )
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Put the context of its object next to every position.

        Args:
            x: Map [B, C, H, W].

        Returns:
            Map [B, C', H, W].

        Raises:
            TypeError: If `x` is not floating point.
            ValueError: If `x` is not [B, C, H, W] with the C of the module.
        """
        context = self.attention(x).to(x.dtype)
        return self.dropout(self.fuse(torch.cat([context, x], dim=1))).to(x.dtype)
