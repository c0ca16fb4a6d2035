"""Two convolutions with a context module between them (Squeeze Reasoning, Sec. IV, Table IV).

Letters: B batch, K classes, C channels of the backbone's map, h w map.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ctxops.heads.apnb import AsymmetricNonLocal
from ctxops.heads.compact_non_local import CompactNonLocal
from ctxops.heads.context_encoding import ContextEncoding
from ctxops.heads.criss_cross import RecurrentCrissCross
from ctxops.heads.double_attention import DoubleAttention
from ctxops.heads.em_attention import EMAttention
from ctxops.heads.global_context import GlobalContext
from ctxops.heads.non_local import NonLocal
from ctxops.heads.object_context import ObjectContext
from ctxops.heads.squeeze_excitation import SqueezeExcitation
from ctxops.init import fan_in_uniform_
from ctxops.norm import ConvNorm
from segtrain.config.sr import ContextHeadConfig
from segtrain.models.heads.reasoning import build_reasoning
from segtrain.models.maps import Features, Maps, deepest


class ContextHead(nn.Module):
    """Convolution, context, convolution, classifier.

    Args:
        feature: Name of the map it reads.
        reduce: From that map to [B, channels, h, w].
        context: From a map [B, channels, h, w] to one of the same shape.
        refine: The same.
        fuse: From [B, C + channels, h, w], the backbone's map and the result, to
            [B, channels, h, w]; None takes the result as it is.
        classifier: To [B, K, h, w].
        dropout: Before the classifier, of whole channels.
    """

    def __init__(
        self,
        *,
        feature: str,
        reduce: nn.Module,
        context: nn.Module,
        refine: nn.Module,
        fuse: nn.Module | None,
        classifier: nn.Module,
        dropout: float,
    ) -> None:
        super().__init__()
        self.feature = feature
        self.reduce, self.context, self.refine, self.fuse = reduce, context, refine, fuse
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = classifier

    def forward(self, features: Features, image: Tensor) -> dict[str, Tensor]:
        """Classify.

        Args:
            features: Maps of the backbone.
            image: Not used.

        Returns:
            "logits" [B, K, h, w] at the size of the map.
        """
        deep = features[self.feature]
        x = self.refine(self.context(self.reduce(deep)))
        if self.fuse is not None:
            x = self.fuse(torch.cat([deep, x], dim=1))
        return {"logits": self.classifier(self.dropout(x))}


# Name -> module between the convolutions, from (section, channels).
CONTEXTS: dict[str, Callable[[ContextHeadConfig, int], nn.Module]] = {
    "none": lambda config, channels: nn.Identity(),
    "sr": lambda config, channels: build_reasoning(config.sr, channels),
    "se": lambda config, channels: SqueezeExcitation(in_channels=channels),
    "nl": lambda config, channels: NonLocal(in_channels=channels),
    "a2": lambda config, channels: DoubleAttention(in_channels=channels),
    "cgnl": lambda config, channels: CompactNonLocal(in_channels=channels),
    "emau": lambda config, channels: EMAttention(in_channels=channels),
    "rcca": lambda config, channels: RecurrentCrissCross(in_channels=channels),
    "encoding": lambda config, channels: ContextEncoding(in_channels=channels),
    "apnb": lambda config, channels: AsymmetricNonLocal(in_channels=channels),
    "gc": lambda config, channels: GlobalContext(in_channels=channels),
    "oc": lambda config, channels: ObjectContext(in_channels=channels),
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

    Raises:
        ValueError: If the context module does not take the width.
    """
    (name,) = deepest(maps, 1, head="head context")
    deep, channels = maps[name].channels, config.channels
    bare = config.layout == "official_2024"
    return ContextHead(
        feature=name,
        reduce=fan_in_uniform_(nn.Conv2d(deep, channels, 1)) if bare else _conv(deep, channels),
        context=CONTEXTS[config.module](config, channels),
        refine=_conv(channels, channels, bias=bare),
        fuse=_conv(deep + channels, channels) if config.layout == "official_2021" else None,
        classifier=nn.Conv2d(channels, num_classes, 1),
        dropout=config.dropout,
    )


def _conv(in_channels: int, out_channels: int, *, bias: bool = False) -> ConvNorm:
    return ConvNorm(in_channels=in_channels, out_channels=out_channels, kernel_size=3, bias=bias)
