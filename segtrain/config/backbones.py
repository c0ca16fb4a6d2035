"""Configuration of backbones; one class each, told apart by `name`."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from segtrain.config.base import Count, FromList, Positive, Rate, Section, Text
from segtrain.config.sr_backbones import DFConfig, WideResNetConfig
from segtrain.config.timm_backbone import TimmConfig
from segtrain.config.vit import VitSizes


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

    gate: Literal["none", "se", "sr"] = "none"
    """Gate on the last norm of every block: squeeze-and-excitation, or squeeze reasoning."""

    pretrained: Text | None = None
    """Weights: a name that timm knows, or a file; null starts from random ones."""

    def problems(self) -> Iterator[str]:
        """What is wrong between the keys of this section, each text with its fix."""
        if self.multi_grid and self.output_stride == 32:
            yield "multi_grid needs a dilated last stage; write output_stride: 8 or 16"


class VitConfig(VitSizes):
    """Plain vision transformer; maps are taken between its layers, without a last norm."""

    name: Literal["vit"]
    """Which backbone."""

    blocks: Annotated[tuple[Count, ...], Field(min_length=1), FromList] = (4, 8, 12)
    """Layers, from 1, behind which a map is taken; the last one is the last."""

    dropout: Rate = 0.0
    """Dropout."""

    drop_path_rate: Rate = 0.1
    """Stochastic depth of the last layer, growing linearly from the first."""

    layer_norm_eps: Positive = 1e-6
    """1e-6 as in timm."""

    pos_embed_resize: Literal["bilinear", "bicubic"] = "bilinear"
    """How position embeddings get to another grid."""

    pretrained: Text | None = None
    """Weights: a name that timm knows, or a file; null starts from random ones."""

    def problems(self) -> Iterator[str]:
        """What is wrong between the keys of this section, each text with its fix."""
        sizes = list(super().problems())
        yield from sizes
        if not sizes and self._blocks_are_wrong:
            yield (
                f"blocks must rise and end at the depth {self.widths[1]}, the last layer, got "
                f"{list(self.blocks)}; write blocks: [{self.widths[1]}]"
            )

    @property
    def _blocks_are_wrong(self) -> bool:
        return list(self.blocks) != sorted(set(self.blocks)) or self.blocks[-1] != self.widths[1]


BackboneConfig = Annotated[
    ResNetConfig | DFConfig | WideResNetConfig | VitConfig | TimmConfig,
    Field(discriminator="name"),
]
