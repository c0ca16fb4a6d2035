"""Merging neighbouring pyramid levels, in either direction.

Every step takes the running map of the neighbouring level (`source`) and the map of its own level
(`target`), and returns a map of the size of `target`. Both are D wide; the coarser one has half the
size of the finer one, rounded up.

Letters: B batch, D pyramid width, H W size of the source, H' W' size of the target.
"""

import torch
from torch import Tensor, nn

from ctxops.checks import check_map, check_neighbours
from ctxops.resize import crop, max_pool, resize_bilinear


class SumFusion(nn.Module):
    """target + resample(source), as in FPN, PAFPN and CARAFE.

    Args:
        resample: Map [B, D, H, W] to a map of the size of the target, or one row or column larger.
    """

    def __init__(self, *, resample: nn.Module) -> None:
        super().__init__()
        self.resample = resample

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Merge two levels at the size of the target.

        Args:
            source: Map of the neighbouring level [B, D, H, W].
            target: Map of this level [B, D, H', W'].

        Returns:
            Map [B, D, H', W'].

        Raises:
            TypeError: If a map is not floating point.
            ValueError: If the widths differ or the sizes are not those of neighbouring levels.
        """
        finer, coarser = sorted((source, target), key=Tensor.numel, reverse=True)
        _check_levels(finer, coarser)
        return crop(self.resample(source), target.shape[-2:]) + target


class GuidedFusion(nn.Module):
    """What both guided steps are made of; they differ in where the guide lives.

    Args:
        resample: (source [B, D, H, W], guide [B, 2D, H, W]) to a map of the size of the target, or
            one row or column larger.
        attention: Guide [B, 2D, H, W] to channel weights [B, 2D, 1, 1]: S^ first, then Sv.
    """

    def __init__(self, *, resample: nn.Module, attention: nn.Module) -> None:
        super().__init__()
        self.resample = resample
        self.attention = attention


class GuidedTopDown(GuidedFusion):
    """GACARAFE: P_i^td = S^ * up(P_{i+1}^td) + Sv * P_i^lc (A²-FPN, Eqs. 7 to 10).

    Up-sampling kernels and channel weights see both levels, at the coarse resolution.
    """

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Merge two levels at the fine resolution.

        Args:
            source: The coarse map P_{i+1}^td [B, D, H, W].
            target: The fine map P_i^lc [B, D, H', W'].

        Returns:
            P_i^td [B, D, H', W'].

        Raises:
            TypeError: If a map is not floating point.
            ValueError: If the widths differ or the sizes are not those of neighbouring levels.
        """
        _check_levels(target, source)
        guide = torch.cat([source, max_pool(target, stride=2)], dim=1)  # [B, 2D, H, W]
        up = crop(self.resample(source, guide), target.shape[-2:])
        source_weight, target_weight = self.attention(guide).chunk(2, dim=1)
        return source_weight * up + target_weight * target


class GuidedBottomUp(GuidedFusion):
    """GACAP: P_i^bu = S^ * P_i^td + Sv * pool(P_{i-1}^bu) (A²-FPN, Eqs. 11 to 13).

    Pooling kernels and channel weights see both levels, at the fine resolution.

    Deviation: the paper does not give the corner convention of the bilinear resize; pixel edges are
    matched (align_corners False).
    """

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Merge two levels at the coarse resolution.

        Args:
            source: The fine map P_{i-1}^bu [B, D, H, W].
            target: The coarse map P_i^td [B, D, H', W'].

        Returns:
            P_i^bu [B, D, H', W'].

        Raises:
            TypeError: If a map is not floating point.
            ValueError: If the widths differ or the sizes are not those of neighbouring levels.
        """
        _check_levels(source, target)
        enlarged = resize_bilinear(target, source.shape[-2:], align_corners=False)
        guide = torch.cat([source, enlarged.to(source.dtype)], dim=1)  # [B, 2D, H, W]
        down = self.resample(source, guide)
        target_weight, source_weight = self.attention(guide).chunk(2, dim=1)
        return target_weight * target + source_weight * down


def _check_levels(finer: Tensor, coarser: Tensor) -> None:
    check_map(finer, "finer map")
    check_map(coarser, "coarser map", channels=finer.shape[1])
    check_neighbours(finer, coarser, "maps to merge")
