"""Configuration of the model; one class per method, told apart by `name`."""

from typing import Annotated, Literal

from pydantic import Field

from segtrain.config.base import Count, Positive, Rate, Text
from segtrain.config.network import NetworkConfig
from segtrain.config.vit import VitSizes


class SegmenterConfig(VitSizes):
    """Segmenter: a plain vision transformer and a linear or a mask-transformer decoder."""

    name: Literal["segmenter"]
    """Which method."""

    decoder: Literal["mask", "linear"] = "mask"
    """Which decoder."""

    decoder_layers: Count = 2
    """Layers of the mask transformer."""

    normalize_classes: bool = True
    """Whether the mask transformer brings its class embeddings to length one (Eq. 4)."""

    dropout: Rate = 0.0
    """Dropout of the encoder."""

    drop_path_rate: Rate = 0.1
    """Stochastic depth of the last encoder layer, growing linearly from the first."""

    decoder_dropout: Rate = 0.1
    """Dropout of the mask transformer."""

    decoder_drop_path: Rate = 0.0
    """Stochastic depth of the last layer of the mask transformer."""

    layer_norm_eps: Positive = 1e-5
    """1e-5 as released by the authors, 1e-6 as in timm and MMSegmentation."""

    decoder_layer_norm_eps: Positive | None = None
    """Of the mask transformer; null takes `layer_norm_eps`. MMSegmentation has 1e-5 here."""

    pos_embed_resize: Literal["bilinear", "bicubic"] = "bilinear"
    """How position embeddings get to another grid; bicubic as in MMSegmentation."""

    pretrained: Text | None = None
    """Weights of the encoder: a name that timm knows, or a file; null starts from random ones."""

    @property
    def smallest_window(self) -> int:
        """The smallest image side that the model takes: what lacks at a patch is padded."""
        return self.patch_size


ModelConfig = Annotated[SegmenterConfig | NetworkConfig, Field(discriminator="name")]
