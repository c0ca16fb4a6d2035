"""Heads: one file per kind, found by the `name` of their section."""

from collections.abc import Callable

from torch import nn

from segtrain.config.heads import HeadConfig
from segtrain.models.heads.context import build_context_head
from segtrain.models.maps import Maps

__all__ = ["HEADS", "build_head"]

HEADS: dict[str, Callable[..., nn.Module]] = {"context": build_context_head}


def build_head(
    config: HeadConfig, maps: Maps, *, num_classes: int, image_size: tuple[int, int]
) -> nn.Module:
    """Build a head with random weights.

    Args:
        config: The section `model.head`.
        maps: What the backbone offers.
        num_classes: K.
        image_size: (H, W) of a training crop.

    Returns:
        A module from (the backbone's maps, images [B, 3, H, W]) to {"logits": [B, K, h, w]} and
        what else its loss needs. `classifier` is the part whose shape depends on K.

    Raises:
        UserError: If the backbone lacks a map, or the configuration contradicts itself.
    """
    return HEADS[config.name](config, maps, num_classes=num_classes, image_size=image_size)
