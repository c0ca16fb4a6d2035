"""Levels of a pyramid that may have any sizes: checks, names of pairs, and 1x1 projections.

Letters: B batch, C pyramid width, C_l channels of level l, H_l W_l map, L levels.
"""

from collections.abc import Sequence

from torch import Tensor

from ctxops.checks import check_map
from ctxops.lateral import PyramidLateral, level_names
from ctxops.norm import ConvNorm


def pair_name(target: str, source: str) -> str:
    """Name of the transformer that brings one level to another.

    Args:
        target: Level it writes, as `p2`.
        source: Level it reads besides, as `p4`.

    Returns:
        As `p2_from_p4`.
    """
    return f"{target}_from_{source}"


def level_pairs(num_levels: int, *, max_gap: int | None = None) -> list[tuple[int, int]]:
    """Pairs (fine, coarse) of level indices.

    Args:
        num_levels: L.
        max_gap: Most levels between the two; None: any.

    Returns:
        The pairs, sorted.
    """
    gap = num_levels if max_gap is None else max_gap
    return [(f, c) for f in range(num_levels) for c in range(f + 1, num_levels) if c - f <= gap]


def check_levels(features: Sequence[Tensor], in_channels: Sequence[int]) -> None:
    """Refuse anything but one map per level, of one batch size, none larger than the one before.

    Args:
        features: L maps [B, C_l, H_l, W_l], fine to coarse.
        in_channels: The L channel counts a module was built for.

    Raises:
        TypeError: If a level is not a floating point tensor.
        ValueError: If levels, channels, batch sizes or the order of sizes do not fit.
    """
    if len(features) != len(in_channels):
        raise ValueError(
            f"features: expected {len(in_channels)} maps, fine to coarse, got {len(features)}; "
            "pass one map per entry of in_channels"
        )
    for level, (x, channels) in enumerate(zip(features, in_channels, strict=True)):
        check_map(x, f"features[{level}]", channels=channels)
    shapes = [tuple(x.shape) for x in features]
    for fine, coarse in zip(shapes, shapes[1:], strict=False):
        if fine[0] != coarse[0] or fine[2] < coarse[2] or fine[3] < coarse[3]:
            raise ValueError(
                f"features: expected maps of one batch size, fine to coarse, got {shapes}; "
                "reverse the list if it starts with the coarsest map"
            )


class PointwiseLateral(PyramidLateral):
    """One 1x1 convolution per level, with an optional norm: the bottom-up pyramid, BFP (FPT, 3.5).

    Nothing is added from level to level, and no 3x3 convolution follows.

    Args:
        in_channels: C_l per level, fine to coarse.
        out_channels: C.
        norm: As in `make_norm`; the convolutions have biases where it is `""`.
    """

    def __init__(self, *, in_channels: Sequence[int], out_channels: int, norm: str = "") -> None:
        super().__init__(in_channels=in_channels)
        for name, channels in zip(level_names(len(in_channels)), in_channels, strict=True):
            conv = ConvNorm(
                in_channels=channels, out_channels=out_channels, kernel_size=1, norm=norm, act=False
            )
            self.add_module(name, conv)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Project every level.

        Args:
            features: L maps [B, C_l, H_l, W_l], fine to coarse.

        Returns:
            L maps [B, C, H_l, W_l].

        Raises:
            TypeError: If a level is not a floating point map.
            ValueError: If levels, channels or the order of sizes do not fit.
        """
        check_levels(features, self.in_channels)
        return [conv(x) for conv, x in zip(self.children(), features, strict=True)]
