"""Merging neighbouring pyramid levels, in either direction.

Every step takes the running map of the neighbouring level (`source`) and the map of its own level
(`target`), and returns a map of the size of `target`. Both are D wide; the coarser one has half the
size of the finer one, rounded up.

Letters: B batch, D pyramid width, H W size of the source, H' W' size of the target.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ctxops.channel_attention import ChannelAttention
from ctxops.checks import check_map, check_neighbours
from ctxops.guide_pass import GuidePass
from ctxops.plain import are_plain, has_hooks
from ctxops.resampling import ContentAwarePool, ContentAwareUp, KernelPredictor
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

    def _guided(
        self, first: Tensor, second: Tensor
    ) -> tuple[Sequence[Tensor], Callable[[Tensor, Tensor], Tensor]]:
        """What depends on the guide [first, enlarged second], both [B, D, ., .].

        Returns:
            S^ and Sv [B, D, 1, 1], and a function of a map and its channel weights: the map
            resampled, times the weights.
        """
        resample, attention = self.resample, self.attention
        if _takes_pass(resample, attention, first):
            known = cast(ContentAwareUp | ContentAwarePool, resample)
            return _by_pass(known, cast(ChannelAttention, attention), first, second)
        guide = _guide(first, second)
        weights = attention(guide).chunk(2, dim=1)
        return weights, lambda x, weight: weight * resample(x, guide)


def _by_pass(
    resample: ContentAwareUp | ContentAwarePool,
    attention: ChannelAttention,
    first: Tensor,
    second: Tensor,
) -> tuple[Sequence[Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """The same as `GuidedFusion._guided`, see `guide_pass`."""
    predictor = cast(KernelPredictor, resample.predictor)
    layers = predictor.reduce, attention.mask
    reduced, means = GuidePass.apply(
        first.contiguous(),
        second.contiguous(),
        torch.cat([layer.weight for layer in layers]).flatten(1),
        torch.cat([cast(Tensor, layer.bias) for layer in layers]),
    )
    kernels = predictor.from_reduced(reduced)
    weights = attention.from_pooled(means).chunk(2, dim=1)
    if isinstance(resample, ContentAwareUp):  # channel by channel: weighted while small
        return weights, lambda x, weight: resample.with_kernels(weight * x, kernels)
    return weights, lambda x, weight: weight * resample.with_kernels(x, kernels)


def _guide(first: Tensor, second: Tensor) -> Tensor:
    """Both maps side by side [B, 2D, H, W], the second one at the size of the first."""
    if second.shape[2:] != first.shape[2:]:
        enlarged = resize_bilinear(second, first.shape[2:], align_corners=False)
        second = enlarged.to(first.dtype)
    return torch.cat([first, second], dim=1)


def _takes_pass(resample: nn.Module, attention: nn.Module, x: Tensor) -> bool:
    """Whether the parts are those that `guide_pass` knows, and nobody listens to them."""
    if type(resample) not in (ContentAwareUp, ContentAwarePool):
        return False
    predictor = resample.predictor
    if type(predictor) is not KernelPredictor or type(attention) is not ChannelAttention:
        return False
    plain = are_plain(x, predictor.reduce, attention.mask)
    return plain and not has_hooks(resample, predictor, attention)


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
        (source_weight, target_weight), resampled = self._guided(source, max_pool(target, stride=2))
        return crop(resampled(source, source_weight), target.shape[-2:]) + target_weight * target


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
        (target_weight, source_weight), resampled = self._guided(source, target)
        return target_weight * target + resampled(source, source_weight)


def _check_levels(finer: Tensor, coarser: Tensor) -> None:
    check_map(finer, "finer map")
    check_map(coarser, "coarser map", channels=finer.shape[1])
    check_neighbours(finer, coarser, "maps to merge")
