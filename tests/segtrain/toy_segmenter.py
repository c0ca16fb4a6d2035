"""Small Segmenters for tests."""

from typing import Any

import torch
from torch import nn

from segtrain.config.schema import SegmenterConfig
from segtrain.models import build_model


def built(fields: dict[str, Any], *, num_classes: int, image_size) -> nn.Module:
    """A model from keys of the section `model`."""
    config = SegmenterConfig.model_validate({"name": "segmenter", **fields})
    return build_model(config, num_classes, image_size=tuple(image_size))


def tiny(*, num_classes: int = 5, image_size=(8, 12), **fields: Any) -> nn.Module:
    """Patches of 4 pixels, width 8, two layers and one of a mask transformer."""
    small = {"embed_dim": 8, "depth": 2, "num_heads": 2, "patch_size": 4, "decoder_layers": 1}
    return built(small | fields, num_classes=num_classes, image_size=image_size)


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model
