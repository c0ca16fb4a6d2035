"""Configuration of the all-MLP head of SegFormer."""

from typing import Literal

from segtrain.config.base import Count, Rate, Section


class MlpHeadConfig(Section):
    """Deepest maps projected to one width, resized to the finest of them, joined, classified."""

    name: Literal["mlp"]
    """Which head."""

    num_maps: Count = 4
    """How many of the backbone's deepest maps it reads."""

    channels: Count = 256
    """Width of the projections and of what joins them."""

    dropout: Rate = 0.1
    """Dropout before the classifier."""
