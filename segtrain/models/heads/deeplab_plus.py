"""Decoder of DeepLabv3+ with squeeze reasoning (Squeeze Reasoning, Wider-ResNet-38).

Letters: B batch, K classes, h w finest map.
"""

import torch
from torch import Tensor, nn

from ctxops.heads.aspp import ASPP
from ctxops.init import fan_in_uniform_
from ctxops.norm import ConvNorm
from ctxops.resize import resize_bilinear
from segtrain.config.sr import DeepLabPlusHeadConfig
from segtrain.models.heads.reasoning import build_reasoning
from segtrain.models.maps import Features, Maps, deepest


class DeepLabPlusHead(nn.Module):
    """Context of the deepest map, next to the finest map: two 3x3 convolutions and a classifier.

    Args:
        low: Name of the finest map.
        deep: Name of the deepest map.
        low_in_channels: Channels of the finest map.
        low_channels: Width it is brought to, by a bare 1x1 convolution.
        context: From the deepest map to `channels` channels.
        channels: Width of the decoder.
        num_classes: K.
        align_corners: Of the resizing of the deepest map.
    """

    def __init__(
        self,
        *,
        low: str,
        deep: str,
        low_in_channels: int,
        low_channels: int,
        context: nn.Module,
        channels: int,
        num_classes: int,
        align_corners: bool,
    ) -> None:
        super().__init__()
        self.low, self.deep = low, deep
        self.align_corners = align_corners
        self.context = context
        self.lateral = fan_in_uniform_(nn.Conv2d(low_in_channels, low_channels, 1, bias=False))
        self.refine = nn.Sequential(
            ConvNorm(in_channels=channels + low_channels, out_channels=channels, kernel_size=3),
            ConvNorm(in_channels=channels, out_channels=channels, kernel_size=3),
        )
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: Features, image: Tensor) -> dict[str, Tensor]:
        """Classify.

        Args:
            features: Maps of the backbone.
            image: Not used.

        Returns:
            "logits" [B, K, h, w] at the size of the finest map.
        """
        low = self.lateral(features[self.low])
        deep = self.context(features[self.deep])
        deep = resize_bilinear(deep, low.shape[2:], align_corners=self.align_corners)
        return {"logits": self.classifier(self.refine(torch.cat([low, deep], dim=1)))}


def build_deeplab_plus_head(
    config: DeepLabPlusHeadConfig, maps: Maps, *, num_classes: int, image_size: tuple[int, int]
) -> DeepLabPlusHead:
    """Build the decoder on the finest and the deepest map.

    Args:
        config: The section.
        maps: What the backbone offers.
        num_classes: K.
        image_size: Not used.

    Returns:
        The head.

    Raises:
        UserError: If there is one map only.
        ValueError: If squeeze reasoning does not take the width.
    """
    _, deep = deepest(maps, 2, head="head deeplab_plus")
    low = next(iter(maps))
    return DeepLabPlusHead(
        low=low,
        deep=deep,
        low_in_channels=maps[low].channels,
        low_channels=config.low_channels,
        context=_context(config, maps[deep].channels),
        channels=config.channels,
        num_classes=num_classes,
        align_corners=config.align_corners,
    )


def _context(config: DeepLabPlusHeadConfig, in_channels: int) -> nn.Sequential:
    """ASPP, ASPP and reasoning, or as in the dilated FCN a 3x3 convolution and reasoning."""
    channels = config.channels
    if config.sr_position == "replace_aspp":
        wide = 2 * channels
        return nn.Sequential(
            ConvNorm(in_channels=in_channels, out_channels=wide, kernel_size=3),
            build_reasoning(config.sr, wide),
            ConvNorm(in_channels=wide, out_channels=channels, kernel_size=1),
        )
    pyramid = ASPP(
        in_channels=in_channels,
        out_channels=channels,
        dilations=config.dilations,
        dropout=config.dropout,
    )
    if config.sr_position == "none":
        return nn.Sequential(pyramid)
    return nn.Sequential(pyramid, build_reasoning(config.sr, channels))
