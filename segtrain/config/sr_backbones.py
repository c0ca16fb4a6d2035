"""Configuration of the backbones of Squeeze Reasoning that timm does not have."""

from typing import Literal

from segtrain.config.base import Count, Rate, Section, Text


class DFConfig(Section):
    """DF1 or DF2 (Partial Order Pruning), basic blocks for real time."""

    name: Literal["df"]
    """Which backbone."""

    version: Literal[1, 2] = 2
    """DF1 or DF2."""

    width: Count = 64
    """Width of the first stage; the others are its multiples."""

    pretrained: Text | None = None
    """Weights, a file of ours; null starts from random ones."""


class WideResNetConfig(Section):
    """Wider-ResNet-38 (A2), pre-activation, dilated to 1/8."""

    name: Literal["wide_resnet38"]
    """Which backbone."""

    width: Count = 64
    """Width of the first convolution; the others are its multiples."""

    dropout: Rate = 0.3
    """Dropout in the blocks of the sixth stage."""

    last_dropout: Rate = 0.5
    """Dropout in the block of the seventh stage."""

    pretrained: Text | None = None
    """Weights, a file of ours; null starts from random ones."""
