"""Normalisation layers of maps by name, and a convolution with one. `""` is none, everywhere."""

from collections.abc import Callable

from torch import Tensor, nn

from ctxops.checks import check_choice, check_map, check_odd, check_positive
from ctxops.init import fan_in_uniform_

NORMS = ("", "BN", "SyncBN", "GN")


def make_norm(norm: str, channels: int, *, num_groups: int = 32) -> nn.Module:
    """The normalisation layer of a map [B, C, H, W].

    Args:
        norm: `BN`, `SyncBN` (equal to BN where no process group exists), `GN`, or `""` for none. A
            convolution in front needs a bias only where it is `""`.
        channels: C.
        num_groups: Groups of `GN`.

    Returns:
        A module that keeps the shape.

    Raises:
        ValueError: If `norm` is unknown, or C is not a multiple of the number of groups.
    """
    check_choice(norm, "norm", NORMS)
    check_positive(channels, "channels")
    if norm == "BN":
        return nn.BatchNorm2d(channels)
    if norm == "SyncBN":
        return nn.SyncBatchNorm(channels)
    if norm == "GN":
        if channels % num_groups:
            raise ValueError(
                f"norm: GN with {num_groups} groups needs a multiple of {num_groups} channels, got "
                f"{channels}; change the width or use 'BN'"
            )
        return nn.GroupNorm(num_groups, channels)
    return nn.Identity()


class ConvNorm(nn.Module):
    """Convolution, norm, and optionally ReLU; the size is kept or divided, rounding up.

    Args:
        in_channels: C.
        out_channels: C'.
        kernel_size: Odd window; the padding keeps the size at stride 1.
        stride: Distance of the windows.
        dilation: Distance of the taps of a window.
        norm: As in `make_norm`.
        bias: Whether the convolution has one; None: only without a norm.
        act: True for a ReLU at the end.
        init: Fills the convolution's weights in place.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is not positive, the window even, or `norm` unknown.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        norm: str = "BN",
        bias: bool | None = None,
        act: bool = True,
        init: Callable[[nn.Conv2d], object] = fan_in_uniform_,
    ) -> None:
        super().__init__()
        check_odd(kernel_size, "kernel_size")
        check_positive(in_channels, "in_channels")
        self.in_channels = in_channels
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=dilation * (kernel_size // 2),
            dilation=dilation,
            bias=norm == "" if bias is None else bias,
        )
        init(self.conv)
        self.norm = make_norm(norm, out_channels)
        self.act = nn.ReLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, normalise, rectify.

        Args:
            x: Map [B, C, H, W].

        Returns:
            Map [B, C', ceil(H / stride), ceil(W / stride)].

        Raises:
            TypeError: If `x` is not floating point.
            ValueError: If `x` is not [B, C, H, W].
        """
        check_map(x, "x", channels=self.in_channels)
        return self.act(self.norm(self.conv(x)))
