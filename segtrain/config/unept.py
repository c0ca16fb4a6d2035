"""Configuration of UN-EPT's head and of its losses."""

from collections.abc import Iterator
from typing import Annotated, Literal

from segtrain.config.base import Count, CountOrZero, FromList, NotNegative, Rate, Section


class UneptConfig(Section):
    """Context branch over maps of the backbone, spatial branch over the image (UN-EPT)."""

    name: Literal["unept"]
    """Which head."""

    levels: Count = 3
    """Maps of the backbone, the deepest ones (L of Table 6)."""

    channels: Count = 256
    """Width of the tokens."""

    num_heads: Count = 8
    """Heads of every attention."""

    points: Count = 16
    """Points per head and map (N of Table 6)."""

    encoder_layers: Count = 2
    """Layers over the tokens of all maps."""

    decoder_layers: Count = 2
    """Layers over the queries, one per 8 x 8 pixels."""

    ffn_dim: Count = 2048
    """Hidden width of the feed-forward parts."""

    dropout: Rate = 0.1
    """Dropout of every layer."""

    self_attention: Literal["deformable", "full", "released"] = "deformable"
    """Among the queries; the released one attends over the batch in training."""

    spatial_branch: bool = True
    """Whether the queries come from the image, and boundaries are predicted and refined."""

    spatial_widths: Annotated[tuple[Count, Count], FromList] = (64, 128)
    """Widths of its first two convolutions; the third has `channels`."""

    last_relu: bool = True
    """Whether its third convolution has a ReLU; the released one has none."""

    query_embedding: Literal["none", "learned"] = "none"
    """A learnt table that is added to the queries, made for the crop and resized for others."""

    boundary_classes: Literal[1, 2] = 1
    """Channels of the boundary head: boundary, or interior and boundary."""

    mask_rule: Literal["probability", "logit"] = "probability"
    """What must exceed 0.5 where logits are refined; the released code takes the raw logit."""

    refine_at_test: bool = True
    """Whether predictions are refined at boundaries."""

    offset_scale: Count = 1
    """Pixels per axis from a boundary pixel to the one whose logits it takes."""

    def problems(self) -> Iterator[str]:
        """What is wrong between the keys of this section, each text with its fix."""
        if self.channels % 4 or self.channels % self.num_heads:
            yield (
                f"channels {self.channels} must be a multiple of 4 and of num_heads "
                f"{self.num_heads}; write channels: {32 * self.num_heads}"
            )
        if not self.spatial_branch and self.query_embedding == "none":
            yield (
                "without a spatial branch the queries must be learnt; write query_embedding: "
                "learned"
            )


class BoundaryLossConfig(Section):
    """Losses of UN-EPT (Eq. 7): weights, and how boundary and direction are learnt."""

    seg_weight: NotNegative = 1.0
    """Of the logits before refinement."""

    refined_weight: NotNegative = 1.5
    """Of the refined logits."""

    boundary_weight: NotNegative = 3.0
    """Of boundary or not."""

    direction_weight: NotNegative = 0.7
    """Of the direction to the interior, on boundary pixels."""

    balance: bool = False
    """Whether boundary classes and directions weigh 1 - their frequency in the batch."""

    direction_mask: Literal["predicted", "ground_truth"] = "predicted"
    """Whose boundary pixels learn a direction."""

    max_distance: Count = 5
    """Half the width of the band that is boundary, in pixels."""

    min_area: CountOrZero = 100
    """Classes with fewer pixels in a crop have neither boundary nor direction."""
