"""PSP and ASPP heads: a pyramid in the place of both convolutions (Squeeze Reasoning, Table IV).

Letters: B batch, K classes, h w map.
"""

from torch import Tensor, nn

from ctxops.heads.aspp import ASPP
from ctxops.heads.pyramid_pooling import PyramidPooling
from segtrain.config.sr import ASPPHeadConfig, PSPHeadConfig
from segtrain.models.maps import Features, Maps, deepest


class PyramidHead(nn.Module):
    """A pyramid over one map, and a classifier.

    Args:
        feature: Name of the map it reads.
        pyramid: From that map to [B, channels, h, w], dropout included.
        channels: Width of its output.
        num_classes: K.
    """

    def __init__(
        self, *, feature: str, pyramid: nn.Module, channels: int, num_classes: int
    ) -> None:
        super().__init__()
        self.feature = feature
        self.pyramid = pyramid
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: Features, image: Tensor) -> dict[str, Tensor]:
        """Classify.

        Args:
            features: Maps of the backbone.
            image: Not used.

        Returns:
            "logits" [B, K, h, w] at the size of the map.
        """
        return {"logits": self.classifier(self.pyramid(features[self.feature]))}


def build_psp_head(
    config: PSPHeadConfig, maps: Maps, *, num_classes: int, image_size: tuple[int, int]
) -> PyramidHead:
    """Build pyramid pooling on the deepest map.

    Args:
        config: The section.
        maps: What the backbone offers.
        num_classes: K.
        image_size: Not used.

    Returns:
        The head.
    """
    (name,) = deepest(maps, 1, head="head psp")
    pyramid = PyramidPooling(
        in_channels=maps[name].channels,
        out_channels=config.channels,
        bins=config.bins,
        dropout=config.dropout,
        align_corners=config.align_corners,
    )
    return PyramidHead(
        feature=name, pyramid=pyramid, channels=config.channels, num_classes=num_classes
    )


def build_aspp_head(
    config: ASPPHeadConfig, maps: Maps, *, num_classes: int, image_size: tuple[int, int]
) -> PyramidHead:
    """Build atrous pyramid pooling on the deepest map.

    Args:
        config: The section.
        maps: What the backbone offers.
        num_classes: K.
        image_size: Not used.

    Returns:
        The head.
    """
    (name,) = deepest(maps, 1, head="head aspp")
    pyramid = ASPP(
        in_channels=maps[name].channels,
        out_channels=config.channels,
        dilations=config.dilations,
        dropout=config.dropout,
    )
    return PyramidHead(
        feature=name, pyramid=pyramid, channels=config.channels, num_classes=num_classes
    )
