"""Layers of PANet's heads: pooling from all levels, and their fusion.

Liu et al., "Path Aggregation Network for Instance Segmentation", CVPR 2018, section 3.2.

Letters: B batch, R regions, L levels, C channels of the pyramid, D width of a head, s side of a
pooled region.
"""

from collections.abc import Sequence
from functools import reduce

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.layers import Conv2d, get_norm
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor, nn


class AllLevelPooler(nn.Module):
    """Pools every region from every level; PANet's adaptive feature pooling.

    Args:
        output_size: s.
        scales: 1 / stride of every level.
        sampling_ratio: As in Detectron2's `ROIPooler`.
        pooler_type: As there.
    """

    def __init__(
        self, *, output_size: int, scales: Sequence[float], sampling_ratio: int, pooler_type: str
    ) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            ROIPooler(output_size, [scale], sampling_ratio, pooler_type) for scale in scales
        )
        self.output_size = (output_size, output_size)

    def forward(self, features: list[Tensor], boxes: list[Boxes]) -> Tensor:
        """Pool.

        Args:
            features: L maps [B, C, H_l, W_l].
            boxes: Those of each image, corners in pixels of the image.

        Returns:
            [R, L, C, s, s].
        """
        pooled = [pool([x], boxes) for pool, x in zip(self.levels, features, strict=True)]
        return torch.stack(pooled, dim=1)


class FusedConv(nn.Module):
    """A 3x3 convolution of its own for every level, then the largest value over the levels.

    "One parameter layer, followed by fusion" (PANet, 3.2); the authors' code has one per level.

    Args:
        in_channels: C.
        out_channels: D.
        levels: Names of the L levels.
        norm: As in Detectron2's `get_norm`.
    """

    def __init__(
        self, *, in_channels: int, out_channels: int, levels: Sequence[str], norm: str
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleDict(
            {name: conv3x3(in_channels, out_channels, norm) for name in levels}
        )

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and fuse.

        Args:
            x: [R, L, C, s, s].

        Returns:
            [R, D, s, s].
        """
        levels = zip(self.convs.values(), x.unbind(1), strict=True)
        return reduce(torch.maximum, (conv(level) for conv, level in levels))


def conv3x3(in_channels: int, out_channels: int, norm: str) -> Conv2d:
    """3x3 convolution, norm, ReLU.

    Args:
        in_channels: Channels of the map.
        out_channels: Channels of the result.
        norm: As in Detectron2's `get_norm`; the convolution has a bias where it is "".

    Returns:
        A module that keeps the size.
    """
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size=3,
        padding=1,
        bias=not norm,
        norm=get_norm(norm, out_channels),
        activation=nn.ReLU(),
    )
    weight_init.c2_msra_fill(conv)
    return conv
