"""Pyramid on one map, context between its levels, fusion (FPT, 3.5, Tables 4 and 5).

Letters: B batch, C levels' width, K classes, h w map.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ctxops.fpt import FeaturePyramidTransformer, build_fpt
from ctxops.heads.object_context import ObjectContext
from ctxops.norm import ConvNorm
from ctxops.unscathed import AtrousPyramid, PoolingPyramid, UnscathedPyramid
from segtrain.config.fpt import FptBlockConfig, FptHeadConfig
from segtrain.models.maps import Features, Maps, deepest

_LEVELS = 4
_NORM = "BN"


class FusedPyramidHead(nn.Module):
    """Pyramid, context, levels together through a 3x3 convolution, classifier.

    Deviation: the paper names its head only ("as in" DeepLabv3); this one has no part of its own
    but the fusion.

    Args:
        feature: Name of the map it reads.
        pyramid: From that map to levels [B, C, h, w].
        context: From levels to as many of the same shape.
        in_channels: Channels of all levels together.
        width: Of the convolution.
        num_classes: K.
        dropout: Before the classifier, of whole channels.
    """

    def __init__(
        self,
        *,
        feature: str,
        pyramid: nn.Module,
        context: nn.Module,
        in_channels: int,
        width: int,
        num_classes: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.feature = feature
        self.pyramid = pyramid
        self.context = context
        self.fuse = ConvNorm(in_channels=in_channels, out_channels=width, kernel_size=3, norm=_NORM)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, features: Features, image: Tensor) -> dict[str, Tensor]:
        """Classify.

        Args:
            features: Maps of the backbone.
            image: Not used.

        Returns:
            "logits" [B, K, h, w] at the size of the map.
        """
        levels = self.context(self.pyramid(features[self.feature]))
        x = self.fuse(torch.cat(levels, dim=1))
        return {"logits": self.classifier(self.dropout(x))}


class LevelContext(nn.Module):
    """A module of its own on every level.

    Args:
        levels: From [B, C, h, w] to the same shape, fine to coarse.
    """

    def __init__(self, levels: Sequence[nn.Module]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(levels)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Apply each to its level.

        Args:
            features: Levels.

        Returns:
            As many.
        """
        return [level(x) for level, x in zip(self.levels, features, strict=True)]


# Name -> builder of a pyramid, from the channels of the map and the width of its levels.
PYRAMIDS: dict[str, Callable[..., nn.Module]] = {
    "ufp": UnscathedPyramid,
    "ppm": PoolingPyramid,
    "aspp": AtrousPyramid,
}
# Name -> builder of what the levels go through.
CONTEXTS: dict[str, Callable[[FptHeadConfig], nn.Module]] = {
    "none": lambda config: nn.Identity(),
    "oc": lambda config: LevelContext([_object_context(config) for _ in range(_LEVELS)]),
    "fpt": lambda config: build_block(config.fpt, config.channels),
}


def build_fpt_head(
    config: FptHeadConfig, maps: Maps, *, num_classes: int, image_size: tuple[int, int]
) -> FusedPyramidHead:
    """Build the head on the deepest map.

    Args:
        config: The section.
        maps: What the backbone offers.
        num_classes: K.
        image_size: Not used.

    Returns:
        The head.
    """
    (name,) = deepest(maps, 1, head="head fpt")
    pyramid = PYRAMIDS[config.pyramid](
        in_channels=maps[name].channels, out_channels=config.channels, norm=_NORM
    )
    return FusedPyramidHead(
        feature=name,
        pyramid=pyramid,
        context=CONTEXTS[config.context](config),
        in_channels=_LEVELS * config.channels,
        width=config.width,
        num_classes=num_classes,
        dropout=config.dropout,
    )


def build_block(config: FptBlockConfig, channels: int) -> FeaturePyramidTransformer:
    """Build FPT for four levels of one size.

    Args:
        config: The section.
        channels: Of every level.

    Returns:
        The block.
    """
    options = config.model_dump(exclude={"st", "gt", "rt", "local_size"})
    return build_fpt(
        in_channels=[channels] * _LEVELS,
        channels=channels,
        lateral="none",
        transformers=config.transformers,
        same_size=True,
        local_size=config.local_size if config.gt == "lgt" else 0,
        norm=_NORM,
        **options,
    )


def _object_context(config: FptHeadConfig) -> ObjectContext:
    return ObjectContext(
        in_channels=config.channels,
        reduction=config.oc.reduction,
        norm=_NORM,
        dropout=config.oc.dropout,
    )
