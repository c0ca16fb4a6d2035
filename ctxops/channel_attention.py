"""Channel reweighting from an attention-pooled descriptor (A²-FPN, Eq. 9).

Letters: B batch, C channels, H W map.
"""

from torch import Tensor, nn

from ctxops.checks import check_map, check_positive
from ctxops.init import conv2d, linear
from ctxops.precision import widen


class ChannelAttention(nn.Module):
    """One positive weight per channel: 2 sigma(W_3 ReLU(LN(W_2 z))), z pooled by attention (Eq. 9).

    The mask W_1 x is a softmax over all positions; its bias cancels there and gets no gradient.
    With a zero output of W_3 every weight is `gate_scale` / 2, so 2 sigma starts around 1.

    Deviation: the paper's width of W_2 is garbled in print; C / 4 (half of one of the two maps that
    are concatenated) is the width that gives its parameter counts.

    Args:
        in_channels: C.
        hidden_channels: Output width of W_2.
        gate_scale: Factor of the sigmoid: 2 in the paper, 1 for its ablation with a plain sigmoid.
    """

    def __init__(self, *, in_channels: int, hidden_channels: int, gate_scale: float = 2.0) -> None:
        super().__init__()
        check_positive(in_channels, "in_channels")
        check_positive(hidden_channels, "hidden_channels")
        self.in_channels = in_channels
        self.gate_scale = gate_scale
        self.mask = conv2d(in_channels, 1, 1)
        self.squeeze = linear(in_channels, hidden_channels)
        self.norm = nn.LayerNorm(hidden_channels)
        self.excite = linear(hidden_channels, in_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Weights of the channels.

        Args:
            x: Map [B, C, H, W].

        Returns:
            Weights [B, C, 1, 1] in (0, `gate_scale`).

        Raises:
            TypeError: If `x` is not floating point.
            ValueError: If `x` is not [B, C, H, W] with the C of the module.
        """
        check_map(x, "x", channels=self.in_channels)
        mask = widen(self.mask(x)).flatten(2).softmax(-1).to(x.dtype)  # [B, 1, HW]
        return self.from_pooled((x.flatten(2) @ mask.transpose(1, 2)).squeeze(-1))

    def from_pooled(self, pooled: Tensor) -> Tensor:
        """All but the attention over the positions.

        Args:
            pooled: What it gives, z [B, C].

        Returns:
            Weights as from `forward`.
        """
        hidden = self.norm(self.squeeze(pooled)).relu()
        return (self.gate_scale * self.excite(hidden).sigmoid())[:, :, None, None]
