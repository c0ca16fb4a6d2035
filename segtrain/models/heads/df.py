"""Decoder of DF-Seg and of SRNet(DFv2): three maps, context on the deepest, two fusions.

Letters: B batch, K classes, C channels, h w finest map.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ctxops.heads.pyramid_pooling import PyramidPooling
from ctxops.init import fan_in_uniform_
from ctxops.norm import ConvNorm
from ctxops.resize import resize_bilinear
from segtrain.config.sr import DFHeadConfig
from segtrain.models.heads.reasoning import build_reasoning
from segtrain.models.maps import Features, Maps, deepest


class DFHead(nn.Module):
    """Context, a 1x1 convolution per map, and from deep to fine: resize, concatenate, convolve.

    Args:
        features: Names of three maps, fine to deep.
        in_channels: Their channels; of the deepest those that `context` gives.
        context: On the deepest map.
        channels: C, width of the fusion.
        num_classes: K.
        dropout: Before the classifier, of whole channels.
        align_corners: Of the resizing.
    """

    def __init__(
        self,
        *,
        features: Sequence[str],
        in_channels: Sequence[int],
        context: nn.Module,
        channels: int,
        num_classes: int,
        dropout: float,
        align_corners: bool,
    ) -> None:
        super().__init__()
        self.features = tuple(features)
        self.align_corners = align_corners
        self.context = context
        self.laterals = nn.ModuleList(
            fan_in_uniform_(nn.Conv2d(width, channels, 1)) for width in in_channels
        )
        # Without norm and ReLU, as released.
        self.fusions = nn.ModuleList(_fusion(channels) for _ in in_channels[:-1])
        self.refine = ConvNorm(
            in_channels=channels, out_channels=2 * channels, kernel_size=3, bias=True
        )
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(2 * channels, num_classes, 1)

    def forward(self, features: Features, image: Tensor) -> dict[str, Tensor]:
        """Classify.

        Args:
            features: Maps of the backbone.
            image: Not used.

        Returns:
            "logits" [B, K, h, w] at the size of the finest of the three maps.
        """
        *finer, deep = (features[name] for name in self.features)
        x = self.laterals[-1](self.context(deep))
        for index in reversed(range(len(finer))):
            fine = self.laterals[index](finer[index])  # [B, C, h, w]
            x = resize_bilinear(x, fine.shape[2:], align_corners=self.align_corners)
            x = self.fusions[index](torch.cat([x, fine], dim=1))
        return {"logits": self.classifier(self.dropout(self.refine(x)))}


def build_df_head(
    config: DFHeadConfig, maps: Maps, *, num_classes: int, image_size: tuple[int, int]
) -> DFHead:
    """Build the decoder on the three deepest maps.

    Args:
        config: The section.
        maps: What the backbone offers.
        num_classes: K.
        image_size: Not used.

    Returns:
        The head.

    Raises:
        UserError: If there are fewer than three maps.
        ValueError: If squeeze reasoning does not take the width.
    """
    names = deepest(maps, 3, head="head df")
    widths = [maps[name].channels for name in names]
    context: nn.Module
    if config.context == "sr":
        context = build_reasoning(config.sr, widths[-1])
    else:
        context = _light_pooling(config, widths[-1])
        widths[-1] = config.channels
    return DFHead(
        features=names,
        in_channels=widths,
        context=context,
        channels=config.channels,
        num_classes=num_classes,
        dropout=config.dropout,
        align_corners=config.align_corners,
    )


def _light_pooling(config: DFHeadConfig, in_channels: int) -> PyramidPooling:
    return PyramidPooling(
        in_channels=in_channels,
        out_channels=config.channels,
        bins=config.bins,
        bin_act=False,
        kernel_size=1,
        dropout=config.dropout,
        align_corners=config.align_corners,
    )


def _fusion(channels: int) -> nn.Conv2d:
    return fan_in_uniform_(nn.Conv2d(2 * channels, channels, 3, padding=1, bias=False))
