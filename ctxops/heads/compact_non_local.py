"""Compact generalized non-local block, CGNL ("Compact Generalized Non-local Network").

Letters: B batch, C channels, p width inside, H W map, g groups.
"""

from torch import Tensor, nn

from ctxops.checks import check_divides, check_map, check_positive
from ctxops.init import fan_in_uniform_
from ctxops.precision import autocast_off, widen


def compact_attention(theta: Tensor, phi: Tensor, g: Tensor, *, groups: int) -> Tensor:
    """Per group of channels vec(theta) vec(phi)^T vec(g), the dot-product kernel.

    Positions and channels of a group form one vector, so that the affinity is a single number.

    Args:
        theta: Map [B, p, H, W].
        phi: Map [B, p, H, W].
        g: Map [B, p, H, W].
        groups: Number of groups, a divisor of p.

    Returns:
        Map [B, p, H, W] in at least float32: sums over a whole group leave the range of float16.
    """
    split = groups, theta.shape[1] // groups
    products = (widen(phi) * widen(g)).unflatten(1, split)  # [B, g, p / g, H, W]
    affinity = products.sum((2, 3, 4), keepdim=True)
    return (widen(theta).unflatten(1, split) * affinity).flatten(1, 2)


class CompactNonLocal(nn.Module):
    """y = x + GN(W_z compact_attention(theta(x), phi(x), g(x))), W_z and GN in the same groups.

    The norm is part of the block; without it the products would grow without bound. It divides the
    affinity of its group out again, of which only the sign (and a size near zero) remains.

    Args:
        in_channels: C.
        reduction: C / p, a divisor of C.
        groups: Number of groups, a divisor of p and C.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is not positive or does not divide.
    """

    def __init__(self, *, in_channels: int, reduction: int = 2, groups: int = 8) -> None:
        super().__init__()
        check_positive(in_channels, "in_channels")
        check_positive(reduction, "reduction")
        check_positive(groups, "groups")
        check_divides(reduction, in_channels, "reduction and in_channels")
        width = in_channels // reduction
        check_divides(groups, width, "groups and reduced channels")
        self.in_channels = in_channels
        self.groups = groups
        self.theta = fan_in_uniform_(nn.Conv2d(in_channels, width, 1, bias=False))
        self.phi = fan_in_uniform_(nn.Conv2d(in_channels, width, 1, bias=False))
        self.g = fan_in_uniform_(nn.Conv2d(in_channels, width, 1, bias=False))
        self.out = fan_in_uniform_(nn.Conv2d(width, in_channels, 1, groups=groups, bias=False))
        self.norm = nn.GroupNorm(groups, in_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Let all positions and channels of a group interact.

        Args:
            x: Map [B, C, H, W].

        Returns:
            Map [B, C, H, W], in the dtype of `x`.

        Raises:
            TypeError: If `x` is not floating point.
            ValueError: If `x` is not [B, C, H, W] with the C of the module.
        """
        check_map(x, "x", channels=self.in_channels)
        theta, phi, g = self.theta(x), self.phi(x), self.g(x)
        with autocast_off(x):
            received = compact_attention(theta, phi, g, groups=self.groups)
            update = self.norm(self.out(received.to(self.out.weight.dtype)))
        return x + update.to(x.dtype)
