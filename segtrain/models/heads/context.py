"""Two 3x3 convolutions with a context module between them (Squeeze Reasoning, Sec. IV, Fig. 3).

Letters: B batch, K classes, h w map.
"""

from collections.abc import Callable

from torch import Tensor, nn

from ctxops.norm import ConvNorm
from ctxops.sr import SqueezeReasoning
from segtrain.config.heads import ContextHeadConfig, ReasoningConfig
from segtrain.models.maps import Features, Maps, deepest


class ContextHead(nn.Module):
    """Convolution, context, convolution, classifier.

    Args:
        feature: Name of the map it reads.
        in_channels: Channels of that map.
        channels: Width of the convolutions.
        num_classes: K.
        context: Module from a map [B, channels, h, w] to one of the same shape.
        dropout: Before the classifier, of whole channels.
    """

    def __init__(
        self,
        *,
        feature: str,
        in_channels: int,
        channels: int,
        num_classes: int,
        context: nn.Module,
        dropout: float,
    ) -> None:
        super().__init__()
        self.feature = feature
        self.reduce = ConvNorm(in_channels=in_channels, out_channels=channels, kernel_size=3)
        self.context = context
        self.refine = ConvNorm(in_channels=channels, out_channels=channels, kernel_size=3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: Features, image: Tensor) -> dict[str, Tensor]:
        """Classify.

        Args:
            features: Maps of the backbone.
            image: Not used.

        Returns:
            "logits" [B, K, h, w] at the size of the map.
        """
        x = self.refine(self.context(self.reduce(features[self.feature])))
        return {"logits": self.classifier(self.dropout(x))}


# Name -> builder of a module between the convolutions, from (section, channels).
CONTEXTS: dict[str, Callable[[ContextHeadConfig, int], nn.Module]] = {
    "none": lambda config, channels: nn.Identity(),
    "sr": lambda config, channels: build_reasoning(config.sr, channels),
}


def build_context_head(
    config: ContextHeadConfig, maps: Maps, *, num_classes: int, image_size: tuple[int, int]
) -> ContextHead:
    """Build the head on the deepest map.

    Args:
        config: The section.
        maps: What the backbone offers.
        num_classes: K.
        image_size: Not used.

    Returns:
        The head.
    """
    (name,) = deepest(maps, 1, head="head context")
    return ContextHead(
        feature=name,
        in_channels=maps[name].channels,
        channels=config.channels,
        num_classes=num_classes,
        context=CONTEXTS[config.module](config, config.channels),
        dropout=config.dropout,
    )


def build_reasoning(config: ReasoningConfig, channels: int) -> SqueezeReasoning:
    """Build squeeze reasoning from its section.

    Args:
        config: The section.
        channels: Of the map.

    Returns:
        The module.
    """
    if config.preset == "released":
        return SqueezeReasoning.released(
            in_channels=channels, reduction=config.reduction, nodes=config.nodes
        )
    return SqueezeReasoning(
        in_channels=channels,
        reduction=config.reduction,
        nodes=config.nodes,
        squeeze=config.squeeze,
        reason=config.reason,
        norm="BN",
    )
