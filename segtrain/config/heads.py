"""Configuration of heads; one class each, told apart by `name`."""

from typing import Annotated, Literal

from pydantic import Field

from segtrain.config.base import Count, Rate, Section


class ReasoningConfig(Section):
    """Squeeze reasoning; the keys of `ctxops.SqueezeReasoning`."""

    preset: Literal["paper", "released"] = "paper"
    """`released` is the authors' module, of which only reduction and nodes can be chosen."""

    reduction: Count = 2
    """Input channels per reduced channel."""

    nodes: Count = 16
    """Nodes that the vector is cut into."""

    squeeze: Literal["ghp", "gap"] = "ghp"
    """Global Hadamard pooling, or global average pooling."""

    reason: Literal["gcn", "sa", "fc", "none"] = "gcn"
    """What happens among the nodes."""


class ContextHeadConfig(Section):
    """Two 3x3 convolutions with a context module between them."""

    name: Literal["context"]
    """Which head."""

    module: Literal["none", "sr"] = "sr"
    """What stands between the convolutions."""

    channels: Count = 512
    """Width of the convolutions."""

    dropout: Rate = 0.1
    """Dropout before the classifier."""

    sr: ReasoningConfig = ReasoningConfig()
    """Of the module `sr`."""


HeadConfig = Annotated[ContextHeadConfig, Field()]
