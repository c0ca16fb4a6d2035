"""Configuration of backbones; one class each, told apart by `name`."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from segtrain.config.base import Count, FromList, Section, Text


class ResNetConfig(Section):
    """ResNet of timm, its last stages dilated."""

    name: Literal["resnet"]
    """Which backbone."""

    depth: Literal[18, 34, 50, 101] = 50
    """Number of layers."""

    stem: Literal["plain", "deep32", "deep64"] = "deep64"
    """One 7x7 convolution, or three 3x3 of 32, 32, 64 or of 64, 64, 128 channels."""

    widths: Annotated[tuple[Count, Count, Count, Count], FromList] = (64, 128, 256, 512)
    """Inner widths of the four stages; a quarter of the output widths from depth 50 on."""

    output_stride: Literal[8, 16, 32] = 8
    """Pixels per cell of the deepest map."""

    multi_grid: bool = False
    """Whether the blocks of the last stage dilate by 1, 2, 4 times its dilation."""

    contract_dilation: bool = False
    """Whether the first block of a dilated stage keeps the dilation of the stage before."""

    pretrained: Text | None = None
    """Weights: a name that timm knows, or a file; null starts from random ones."""

    def problems(self) -> Iterator[str]:
        """What is wrong between the keys of this section, each text with its fix."""
        if self.multi_grid and self.output_stride == 32:
            yield "multi_grid needs a dilated last stage; write output_stride: 8 or 16"


BackboneConfig = Annotated[ResNetConfig, Field()]
