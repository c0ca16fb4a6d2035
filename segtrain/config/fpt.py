"""Configuration of the head of FPT: a pyramid on one map, context between its levels, fusion."""

from collections.abc import Iterator
from typing import Annotated, Literal

from segtrain.config.base import Count, CountOrZero, FromList, Positive, Rate, Section


class FptBlockConfig(Section):
    """Feature Pyramid Transformer; the keys of `ctxops.build_fpt`."""

    st: bool = True
    """Self-Transformer: attention within a level."""

    gt: Literal["lgt", "gt", "none"] = "lgt"
    """Grounding Transformer from coarse to fine: in windows, over all positions, or none."""

    rt: bool = True
    """Rendering Transformer, from fine to coarse."""

    pairs: Literal["all", "adjacent"] = "all"
    """Which pairs of levels have a GT and an RT."""

    local_size: Count = 5
    """Side of the window of `lgt`, odd."""

    st_parts: Count = 2
    """Softmaxes that ST mixes."""

    gt_parts: Count = 4
    """Softmaxes that GT mixes."""

    inner_channels: Count | None = None
    """Width of queries, keys and values; null takes that of the levels."""

    st_similarity: Literal["dot", "euclidean"] = "dot"
    """Similarity of ST."""

    gt_similarity: Literal["dot", "euclidean"] = "euclidean"
    """Similarity of GT."""

    scale: Literal["sqrt", "none"] | Positive = "sqrt"
    """Factor of the logits: 1 / sqrt(width), 1, or a number."""

    pi_from: Literal["key", "query"] = "key"
    """Whose mean gives the weights of the softmaxes."""

    share_qk: bool = False
    """Whether ST has one convolution for queries and keys."""

    kv_pool: Count | Annotated[tuple[Count, Count, Count, Count], FromList] = 1
    """Stride at which ST's keys and values are averaged; one number, or one per level."""

    attn_dropout: Rate = 0.0
    """Dropout of attention weights; they then have to exist."""

    rt_gate: Literal["none", "sigmoid"] = "none"
    """Activation of RT's pooled vector."""

    gt_zero_gamma: bool = False
    """Whether GT starts with zero output."""

    dropblock_size: Count = 3
    """Side of the blocks that DropBlock sets to zero on each level's output, odd."""

    dropblock_prob: Rate = 0.1
    """Share of a map that is dropped."""

    dropblock_ramp: CountOrZero = 0
    """Forward passes in training over which the share grows; 0 starts with all of it."""

    @property
    def transformers(self) -> tuple[str, ...]:
        """The chosen kinds, as `ctxops.build_fpt` calls them."""
        chosen = {"st": self.st, "gt": self.gt != "none", "rt": self.rt}
        return tuple(kind for kind, used in chosen.items() if used)

    def problems(self) -> Iterator[str]:
        """What is wrong between the keys of this section, each text with its fix."""
        for key in ("local_size", "dropblock_size"):
            value = getattr(self, key)
            if value % 2 == 0:
                yield f"{key} {value} must be odd; write {key}: {value + 1}"


class ObjectContextConfig(Section):
    """Object context (OCNet's base-OC) on every level."""

    reduction: Count = 2
    """Channels of a level per channel of queries, keys and values."""

    dropout: Rate = 0.05
    """Dropout of whole channels of the output."""


class FptHeadConfig(Section):
    """Pyramid of four maps of one size, context between them, fusion, classifier."""

    name: Literal["fpt"]
    """Which head."""

    pyramid: Literal["ufp", "ppm", "aspp"] = "ufp"
    """Large thin convolutions, pooling, or dilated convolutions."""

    channels: Count = 256
    """Width of the levels."""

    context: Literal["fpt", "oc", "none"] = "fpt"
    """What happens to the levels: FPT, object context, or nothing."""

    width: Count = 256
    """Width of the 3x3 convolution that joins the levels."""

    dropout: Rate = 0.1
    """Dropout before the classifier."""

    fpt: FptBlockConfig = FptBlockConfig()
    """Of the context `fpt`."""

    oc: ObjectContextConfig = ObjectContextConfig()
    """Of the context `oc`."""

    def problems(self) -> Iterator[str]:
        """What is wrong between the keys of this section, each text with its fix."""
        if self.context == "fpt" and not self.fpt.transformers:
            yield "context fpt without any transformer does nothing; write context: none"
        if self.context == "fpt":
            yield from self._width_problems()
        if self.context == "oc" and self.channels % self.oc.reduction:
            yield f"oc.reduction {self.oc.reduction} must divide channels {self.channels}"

    def _width_problems(self) -> Iterator[str]:
        inner = self.fpt.inner_channels or self.channels
        for key in ("st_parts", "gt_parts"):
            parts = getattr(self.fpt, key)
            if inner % parts:
                name = "fpt.inner_channels" if self.fpt.inner_channels else "channels"
                yield f"fpt.{key} {parts} must divide {name} {inner}"
