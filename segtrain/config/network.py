"""Configuration of a network: any head on any backbone that offers what the head needs."""

from collections.abc import Iterator
from typing import Literal

from segtrain.config.backbones import BackboneConfig
from segtrain.config.base import Count, Rate, Section
from segtrain.config.heads import HeadConfig


class AuxConfig(Section):
    """Auxiliary classifier in training, on the map before the deepest; see `loss.aux_weight`."""

    channels: Count = 256
    """Width of its 3x3 convolution."""

    dropout: Rate = 0.1
    """Dropout before the classifier."""


class NetworkConfig(Section):
    """A backbone and a head."""

    name: Literal["network"]
    """Which method."""

    backbone: BackboneConfig
    head: HeadConfig

    aux: AuxConfig | None = None
    """Auxiliary classifier; null has none."""

    freeze_backbone: bool = False
    """Whether the backbone stays as it is loaded, statistics of its norms included."""

    align_corners: bool = False
    """How logits are resized to the image: whether the corner pixels' centres coincide."""

    def problems(self) -> Iterator[str]:
        """What is wrong between the keys of this section, each text with its fix."""
        if self.align_corners and self.head.name == "unept":
            yield "head unept resizes its logits itself; write align_corners: false"

    @property
    def pretrained(self) -> str | None:
        """Weights of the backbone."""
        return self.backbone.pretrained

    @property
    def smallest_window(self) -> int:
        """The smallest image side that the model takes."""
        return 1
