"""Configuration of the model; one class per method, told apart by `name`."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from segtrain.config.base import Count, Positive, Rate, Section, Text
from segtrain.config.network import NetworkConfig

# Variant -> width, layers, heads (Segmenter, Table 1).
SEGMENTER_VARIANTS = {
    "Ti": (192, 12, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
}


class SegmenterConfig(Section):
    """Segmenter: a plain vision transformer and a linear or a mask-transformer decoder."""

    name: Literal["segmenter"]
    """Which method."""

    variant: Literal["Ti", "S", "B", "L"] | None = None
    """Size of the encoder; null takes the three widths below."""

    embed_dim: Count | None = None
    """Width of the tokens, without a variant."""

    depth: Count | None = None
    """Layers of the encoder, without a variant."""

    num_heads: Count | None = None
    """Heads of every layer, without a variant."""

    patch_size: Count = 16
    """Side of a patch in pixels."""

    distilled: bool = False
    """Whether the encoder has the distillation token of DeiT."""

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
    def widths(self) -> tuple[int, int, int]:
        """Width, layers and heads of the encoder."""
        if self.variant is not None:
            return SEGMENTER_VARIANTS[self.variant]
        own = (self.embed_dim, self.depth, self.num_heads)
        assert None not in own, "checked by `problems`"
        return own

    @property
    def smallest_window(self) -> int:
        """The smallest image side that the model takes: what lacks at a patch is padded."""
        return self.patch_size

    def problems(self) -> Iterator[str]:
        """What is wrong between the keys of this section, each text with its fix."""
        own = {key: getattr(self, key) for key in ("embed_dim", "depth", "num_heads")}
        given = [key for key, value in own.items() if value is not None]
        if self.variant is not None and given:
            yield (
                f"{', '.join(given)} would change variant {self.variant}; write variant: null and "
                "all of embed_dim, depth, num_heads, or remove them"
            )
        elif self.variant is None and len(given) < len(own):
            absent = [key for key in own if key not in given]
            yield f"without a variant, {', '.join(absent)} must be given; or write variant: S"
        elif self.variant is None and own["embed_dim"] % own["num_heads"]:
            yield (
                f"num_heads {own['num_heads']} must divide embed_dim {own['embed_dim']}; "
                f"write embed_dim: {64 * own['num_heads']}"
            )


ModelConfig = Annotated[SegmenterConfig | NetworkConfig, Field(discriminator="name")]
