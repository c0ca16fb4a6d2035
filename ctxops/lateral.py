"""What stands between the backbone and the pyramid: the interface, and the plain 1x1 version.

Letters: B batch, C_l channels of level l, D pyramid width, H_l W_l map, L levels.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from ctxops.checks import check_positive, check_pyramid
from ctxops.init import conv2d

# A backbone's finest map has stride 4 = 2^2 and is called res2, its pyramid level p2.
FIRST_LEVEL = 2


def level_names(num_levels: int, *, first: int = FIRST_LEVEL) -> list[str]:
    """Names of pyramid levels, fine to coarse: p2, p3, ... (stride 2^k for p<k>).

    Args:
        num_levels: L.
        first: Number of the finest level.

    Returns:
        L names.
    """
    return [f"p{first + level}" for level in range(num_levels)]


class PyramidLateral(nn.Module):
    """Interface: L backbone maps in, L maps of one width out, sizes unchanged.

    Args:
        in_channels: C_l per level, fine to coarse.

    Raises:
        ValueError: If there are fewer than two levels.
    """

    def __init__(self, *, in_channels: Sequence[int]) -> None:
        super().__init__()
        if len(in_channels) < 2:
            raise ValueError(
                f"in_channels: expected at least two levels, fine to coarse, got {in_channels}; "
                "a pyramid neck fuses neighbouring levels"
            )
        for channels in in_channels:
            check_positive(channels, "in_channels")
        self.in_channels = list(in_channels)

    def aux_losses(self) -> dict[str, Tensor]:
        """Losses that depend on weights only; empty unless a subclass has some.

        Returns:
            Scalars by name.
        """
        return {}


class ConvLateral(PyramidLateral):
    """One 1x1 convolution per level, as in FPN.

    Args:
        in_channels: C_l per level, fine to coarse.
        out_channels: D.
    """

    def __init__(self, *, in_channels: Sequence[int], out_channels: int) -> None:
        super().__init__(in_channels=in_channels)
        names = level_names(len(in_channels))
        for name, channels in zip(names, in_channels, strict=True):
            self.add_module(name, conv2d(channels, out_channels, 1))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Project every level.

        Args:
            features: L maps [B, C_l, H_l, W_l], fine to coarse.

        Returns:
            L maps [B, D, H_l, W_l].

        Raises:
            TypeError: If a level is not a floating point map.
            ValueError: If levels, channels or sizes do not fit.
        """
        check_pyramid(features, self.in_channels)
        return [conv(x) for conv, x in zip(self.children(), features, strict=True)]
