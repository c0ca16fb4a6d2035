"""Models: one file per method, found by the `name` of the configuration."""

from collections.abc import Callable

from torch import nn

from segtrain.config.schema import ModelConfig
from segtrain.models.network import build_network
from segtrain.models.segmenter import build_segmenter

__all__ = ["MODELS", "build_model"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "network": build_network,
    "segmenter": build_segmenter,
}


def build_model(config: ModelConfig, num_classes: int, *, image_size: tuple[int, int]) -> nn.Module:
    """Build a model with random weights; no file is read, so that evaluation needs its own only.

    Args:
        config: The section `model`.
        num_classes: K.
        image_size: (H, W) of a training crop, `data.crop`.

    Returns:
        A module from images [B, 3, H, W] to {"logits": [B, K, H, W]}, with `normalisation`,
        `backbone_parameters()` and `no_weight_decay()`.

    Raises:
        UserError: If the configuration contradicts itself.
    """
    return MODELS[config.name](config, num_classes=num_classes, image_size=image_size)
