"""Rendering Transformer: a coarse level is gated and supplemented by a finer one (FPT, 3.4).

Letters: B batch, C channels, H W fine map, Hc Wc coarse map, m level gap.
"""

from torch import Tensor, nn

from ctxops.checks import check_choice, check_map, check_positive
from ctxops.norm import ConvNorm
from ctxops.resize import resize_bilinear

GATES = ("none", "sigmoid")


def gate_channels(coarse: Tensor, fine: Tensor, *, gate: str = "none") -> Tensor:
    """Q_att = Q * GAP(K): each channel of the coarse map times the fine map's mean (FPT, Eq. 6).

    Args:
        coarse: Q, map [B, C, Hc, Wc].
        fine: K, map [B, C, H, W].
        gate: Activation of the means, `none` or `sigmoid`.

    Returns:
        Map [B, C, Hc, Wc].

    Raises:
        ValueError: If `gate` is unknown.
    """
    check_choice(gate, "gate", GATES)
    means = fine.mean((2, 3), keepdim=True)  # [B, C, 1, 1]
    return coarse * (means.sigmoid() if gate == "sigmoid" else means)


class RenderingTransformer(nn.Module):
    """RT: out = F_add(F_conv(Q * GAP(K)), F_sconv(V)), with K = V the fine map (FPT, Eq. 6).

    R = ReLU(norm(conv(Q * GAP(K)))); V_dow = chain of m convolutions of stride 2 with a norm each
    and ReLU between them; out = norm(conv(ReLU(R + V_dow))). All windows are 3x3. Maps that halve,
    rounding up, from level to level meet exactly; any other V_dow is interpolated to Q's size.

    Deviation: the paper speaks of one strided convolution, and of no norm and activation. One of
    stride 2 per level makes the sizes meet for odd maps too. The pooled vector has no norm.

    Args:
        channels: C.
        gap: m, levels between the two maps; 0 for maps of one size, then V has one convolution of
            stride 1.
        gate: Activation of the pooled vector, `none` or `sigmoid`.
        norm: As in `make_norm`.

    Raises:
        TypeError: If `channels` or `gap` is not an integer.
        ValueError: If `gap` is negative or a name is unknown.
    """

    def __init__(self, *, channels: int, gap: int, gate: str = "none", norm: str = "GN") -> None:
        super().__init__()
        check_positive(channels, "channels")
        check_choice(gate, "gate", GATES)
        if not isinstance(gap, int) or isinstance(gap, bool):
            raise TypeError(f"gap: expected an integer, got {gap!r}; pass a number of levels")
        if gap < 0:
            raise ValueError(f"gap: expected 0 or more, got {gap}; swap the two maps")
        self.channels = channels
        self.gap = gap
        self.gate = gate
        self.query = _conv(channels, norm, act=True)
        self.value = nn.Sequential()
        for link in range(1, max(gap, 1) + 1):
            conv = _conv(channels, norm, stride=2 if gap else 1, act=link < gap)
            self.value.add_module(f"link{link}", conv)
        self.act = nn.ReLU()
        self.output = _conv(channels, norm, act=False)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """Render the coarse map with the fine one's attributes.

        Args:
            coarse: Map [B, C, Hc, Wc].
            fine: Map [B, C, H, W].

        Returns:
            Map [B, C, Hc, Wc].

        Raises:
            TypeError: If a map is not floating point.
            ValueError: If the maps do not have the C of the module and one batch size.
        """
        check_map(coarse, "coarse", channels=self.channels)
        check_map(fine, "fine", channels=self.channels)
        if coarse.shape[0] != fine.shape[0]:
            raise ValueError(
                f"coarse and fine: expected one batch size, got {coarse.shape[0]} and "
                f"{fine.shape[0]}; pass two levels of one pyramid"
            )
        rendered = self.query(gate_channels(coarse, fine, gate=self.gate))
        value = self.value(fine)
        if value.shape[2:] != coarse.shape[2:]:
            value = resize_bilinear(value, coarse.shape[2:], align_corners=False)
        return self.output(self.act(rendered + value))

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"gap={self.gap}, gate={self.gate}"


def _conv(channels: int, norm: str, *, stride: int = 1, act: bool) -> ConvNorm:
    return ConvNorm(
        in_channels=channels,
        out_channels=channels,
        kernel_size=3,
        stride=stride,
        norm=norm,
        act=act,
    )
