"""Global context block, GC ("GCNet: Non-local Networks Meet Squeeze-Excitation Networks").

One attention map for all positions of a map pools one vector, which is transformed and added to
every position.

Letters: B batch, C channels, H W map, h = C / reduction.
"""

from torch import Tensor, nn

from ctxops.checks import check_divides, check_map, check_positive
from ctxops.init import fan_in_uniform_
from ctxops.precision import autocast_off, widen


def attentive_pool(x: Tensor, logits: Tensor) -> Tensor:
    """Mean of the positions, weighted by a softmax over the positions (Eq. 4, context modelling).

    In at least float32, also under autocast.

    Args:
        x: Map [B, C, H, W].
        logits: Map [B, 1, H, W].

    Returns:
        Vectors [B, C].
    """
    with autocast_off(x):
        weights = widen(logits).flatten(2).softmax(2)  # [B, 1, HW]
        return (widen(x).flatten(2) @ weights.transpose(1, 2))[:, :, 0]


class GlobalContext(nn.Module):
    """y = x + W_2 ReLU(LN(W_1 pool(x))), pool with the weights softmax(W_k x) (Eq. 4).

    Starts as the identity: W_2 is zero. W_k has no bias, which the softmax would not see.

    Args:
        in_channels: C.
        reduction: C / h, a divisor of C and not C itself.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is not positive, or `reduction` no divisor of C or C itself.
    """

    def __init__(self, *, in_channels: int, reduction: int = 16) -> None:
        super().__init__()
        check_positive(in_channels, "in_channels")
        check_positive(reduction, "reduction")
        check_divides(reduction, in_channels, "reduction and in_channels")
        hidden = in_channels // reduction
        if hidden < 2:
            raise ValueError(
                f"reduction: expected at most half of the {in_channels} channels, got {reduction}; "
                "of a single number the norm would leave nothing"
            )
        self.in_channels = in_channels
        self.mask = fan_in_uniform_(nn.Conv2d(in_channels, 1, 1, bias=False))
        self.reduce = fan_in_uniform_(nn.Linear(in_channels, hidden))
        self.norm = nn.LayerNorm(hidden)
        self.expand = fan_in_uniform_(nn.Linear(hidden, in_channels))
        nn.init.zeros_(self.expand.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Add what the whole map says to every position.

        Args:
            x: Map [B, C, H, W].

        Returns:
            Map [B, C, H, W], in the dtype of `x`.

        Raises:
            TypeError: If `x` is not floating point.
            ValueError: If `x` is not [B, C, H, W] with the C of the module.
        """
        check_map(x, "x", channels=self.in_channels)
        vector = attentive_pool(x, self.mask(x))
        with autocast_off(x):
            vector = vector.to(self.expand.weight.dtype)
            added = self.expand(self.norm(self.reduce(vector)).relu())  # [B, C]
        return x + added[:, :, None, None].to(x.dtype)
