"""Configuration of the heads of Squeeze Reasoning and of those it is compared with."""

from collections.abc import Iterator
from typing import Annotated, Literal

from segtrain.config.base import Count, FromList, Rate, Section

# What the authors' module leaves to choose.
_RELEASED_KEYS = {"preset", "reduction", "nodes"}

Sizes = Annotated[tuple[Count, ...], FromList]


class ReasoningConfig(Section):
    """Squeeze reasoning; the keys of `ctxops.SqueezeReasoning`."""

    preset: Literal["paper", "released"] = "paper"
    """`released` is the authors' module, of which only reduction and nodes can be chosen."""

    reduction: Count = 2
    """Input channels per reduced channel."""

    nodes: Count | None = None
    """Nodes that the vector is cut into; null takes 16, of the authors' module 32."""

    squeeze: Literal["ghp", "gap"] = "ghp"
    """Global Hadamard pooling, or global average pooling."""

    pool: Literal["mean", "sum"] = "mean"
    """How `ghp` pools; `sum` is the literal Eq. 4 and depends on the size of the map."""

    reason: Literal["gcn", "sa", "fc", "none"] = "gcn"
    """What happens among the nodes."""

    adj: Literal["paper", "released"] = "paper"
    """Of `gcn`: z = G - N(A G), or z = G + ReLU(N(A G))."""

    wr: Literal["grouped", "full"] = "grouped"
    """One factor per reduced channel on a projection of its own, or a dense W_R."""

    norm: Literal["BN", "GN", ""] = "BN"
    """Norm behind W_R; empty for none."""

    node_norm: Literal["BN", "LN", ""] = "BN"
    """Norm inside `gcn`; empty for none."""

    sa_softmax: bool = True
    """Of `sa`: false for the literal Eq. 6."""

    zero_init: bool = False
    """Whether the module starts as the identity."""

    @property
    def num_nodes(self) -> int:
        """Nodes, default filled in."""
        return self.nodes or (32 if self.preset == "released" else 16)

    def problems(self) -> Iterator[str]:
        """What is wrong between the keys of this section, each text with its fix."""
        fixed = sorted(
            key
            for key, field in type(self).model_fields.items()
            if key not in _RELEASED_KEYS and getattr(self, key) != field.default
        )
        if self.preset == "released" and fixed:
            yield f"{', '.join(fixed)} cannot be chosen with preset released; write preset: paper"


class ContextHeadConfig(Section):
    """Two convolutions with a context module between them."""

    name: Literal["context"]
    """Which head."""

    module: Literal[
        "none", "sr", "se", "nl", "a2", "cgnl", "emau", "rcca", "encoding", "apnb", "gc", "oc"
    ] = "sr"
    """What stands between the convolutions."""

    layout: Literal["paper", "official_2021", "official_2024"] = "paper"
    """Two 3x3 convolutions; the same, their result once more fused with the backbone's map; or a
    bare 1x1 convolution in front."""

    channels: Count = 512
    """Width of the convolutions."""

    dropout: Rate = 0.1
    """Dropout before the classifier."""

    sr: ReasoningConfig = ReasoningConfig()
    """Of the module `sr`."""


class PSPHeadConfig(Section):
    """Pyramid pooling in the place of both convolutions (PSPNet)."""

    name: Literal["psp"]
    """Which head."""

    bins: Sizes = (1, 2, 3, 6)
    """Cells per side of the grids."""

    channels: Count = 512
    """Width of the output."""

    dropout: Rate = 0.1
    """Dropout before the classifier."""

    align_corners: bool = True
    """How grids are resized to the map; true as in the authors' code."""


class ASPPHeadConfig(Section):
    """Atrous spatial pyramid pooling in the place of both convolutions (DeepLabv3)."""

    name: Literal["aspp"]
    """Which head."""

    dilations: Sizes = (12, 24, 36)
    """Distances of the taps of its 3x3 convolutions."""

    channels: Count = 256
    """Width of every branch and of the output."""

    dropout: Rate = 0.1
    """Dropout before the classifier."""


class DFHeadConfig(Section):
    """Decoder of DF-Seg on the three deepest maps, for real time."""

    name: Literal["df"]
    """Which head."""

    context: Literal["ppm", "sr"] = "ppm"
    """On the deepest map: pyramid pooling (DF-Seg), or squeeze reasoning (SRNet)."""

    channels: Count = 128
    """Width of the fusion; the last convolution has twice as much."""

    bins: Sizes = (1, 2, 3, 6)
    """Cells per side of the grids of `ppm`."""

    dropout: Rate = 0.1
    """Dropout before the classifier, and of `ppm`."""

    align_corners: bool = True
    """How deeper maps are resized to finer ones; true as in the authors' code."""

    sr: ReasoningConfig = ReasoningConfig()
    """Of the context `sr`."""


class DeepLabPlusHeadConfig(Section):
    """Decoder of DeepLabv3+ on the deepest and the finest map, with squeeze reasoning."""

    name: Literal["deeplab_plus"]
    """Which head."""

    sr_position: Literal["none", "after_aspp", "replace_aspp"] = "after_aspp"
    """Where squeeze reasoning stands; the paper does not say."""

    dilations: Sizes = (12, 24, 36)
    """Distances of the taps of the pyramid's 3x3 convolutions."""

    channels: Count = 256
    """Width of the pyramid and of the decoder."""

    low_channels: Count = 48
    """Width that the finest map is brought to."""

    dropout: Rate = 0.1
    """Dropout of the pyramid."""

    align_corners: bool = True
    """How the deepest map is resized to the finest."""

    sr: ReasoningConfig = ReasoningConfig()
    """Of squeeze reasoning."""
