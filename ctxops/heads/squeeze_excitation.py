"""Squeeze-and-excitation, SE ("Squeeze-and-Excitation Networks").

Letters: B batch, C channels, H W map.
"""

from torch import Tensor, nn

from ctxops.checks import check_divides, check_map, check_positive
from ctxops.init import kaiming_normal_
from ctxops.precision import autocast_off
from ctxops.squeeze import average_pool


class SqueezeExcitation(nn.Module):
    """x * sigmoid(W_2 ReLU(W_1 mean(x))), without biases (Eqs. 2 to 4).

    Args:
        in_channels: C.
        reduction: Factor by which W_1 narrows the vector, a divisor of C.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is not positive or `reduction` does not divide C.
    """

    def __init__(self, *, in_channels: int, reduction: int = 16) -> None:
        super().__init__()
        check_positive(in_channels, "in_channels")
        check_positive(reduction, "reduction")
        check_divides(reduction, in_channels, "reduction and in_channels")
        hidden = in_channels // reduction
        self.in_channels = in_channels
        self.reduce = kaiming_normal_(nn.Linear(in_channels, hidden, bias=False))
        self.expand = kaiming_normal_(nn.Linear(hidden, in_channels, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels.

        Args:
            x: Map [B, C, H, W].

        Returns:
            Map [B, C, H, W], in the dtype of `x`.

        Raises:
            TypeError: If `x` is not floating point.
            ValueError: If `x` is not [B, C, H, W] with the C of the module.
        """
        check_map(x, "x", channels=self.in_channels)
        with autocast_off(x):
            vector = average_pool(x).to(self.reduce.weight.dtype)
            gate = self.expand(self.reduce(vector).relu()).sigmoid()  # [B, C]
        return x * gate[:, :, None, None].to(x.dtype)
