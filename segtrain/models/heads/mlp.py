"""All-MLP head (SegFormer, Xie et al., NeurIPS 2021, Eq. 4): what a strong plain baseline has.

Letters: B batch, C width, K classes, M maps, h w finest map.
"""

import torch
from torch import Tensor, nn

from ctxops.norm import ConvNorm
from ctxops.resize import resize_bilinear
from segtrain.config.mlp import MlpHeadConfig
from segtrain.models.maps import Features, Maps, deepest


class MlpHead(nn.Module):
    """A 1x1 convolution per map, resized to the finest, joined by another, and a classifier.

    Args:
        in_channels: Name -> channels of the maps it reads, shallow to deep.
        channels: C.
        num_classes: K.
        dropout: Before the classifier, of whole channels.
    """

    def __init__(
        self, *, in_channels: dict[str, int], channels: int, num_classes: int, dropout: float
    ) -> None:
        super().__init__()
        self.project = nn.ModuleDict(
            {name: nn.Conv2d(count, channels, 1) for name, count in in_channels.items()}
        )
        self.fuse = ConvNorm(
            in_channels=len(in_channels) * channels, out_channels=channels, kernel_size=1
        )
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: Features, image: Tensor) -> dict[str, Tensor]:
        """Classify.

        Args:
            features: Maps of the backbone.
            image: Not used.

        Returns:
            "logits" [B, K, h, w] at the size of the finest map that is read.
        """
        maps = [project(features[name]) for name, project in self.project.items()]
        size = maps[0].shape[2:]
        same = [resize_bilinear(x, size, align_corners=False) for x in maps]
        x = self.fuse(torch.cat(same, dim=1))  # [B, C, h, w] of [B, M * C, h, w]
        return {"logits": self.classifier(self.dropout(x))}


def build_mlp_head(
    config: MlpHeadConfig, maps: Maps, *, num_classes: int, image_size: tuple[int, int]
) -> MlpHead:
    """Build the head on the deepest maps.

    Args:
        config: The section.
        maps: What the backbone offers.
        num_classes: K.
        image_size: Not used.

    Returns:
        The head.
    """
    names = deepest(maps, config.num_maps, head="head mlp")
    return MlpHead(
        in_channels={name: maps[name].channels for name in names},
        channels=config.channels,
        num_classes=num_classes,
        dropout=config.dropout,
    )
