"""Configuration that plain vision transformers share: their sizes."""

from collections.abc import Iterator
from typing import Literal

from segtrain.config.base import Count, Section

# Variant -> width, layers, heads (Segmenter, Table 1).
SEGMENTER_VARIANTS = {
    "Ti": (192, 12, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
}


class VitSizes(Section):
    """A variant, or three widths."""

    name: str
    """Which one."""

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

    @property
    def widths(self) -> tuple[int, int, int]:
        """Width, layers and heads of the encoder."""
        if self.variant is not None:
            return SEGMENTER_VARIANTS[self.variant]
        own = (self.embed_dim, self.depth, self.num_heads)
        assert None not in own, "checked by `problems`"
        return own

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
