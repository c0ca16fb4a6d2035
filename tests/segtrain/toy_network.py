"""Small networks of backbone and head for tests."""

from typing import Any

from torch import nn

from segtrain.config.schema import NetworkConfig
from segtrain.models import build_model

RESNET = {"name": "resnet", "depth": 18, "widths": [8, 8, 16, 32]}
CONTEXT = {"name": "context", "channels": 16, "sr": {"nodes": 2}}


def section(**fields: Any) -> NetworkConfig:
    """The section `model` with a tiny ResNet and squeeze reasoning, and what is given over it."""
    small = {"name": "network", "backbone": RESNET, "head": CONTEXT, "aux": {"channels": 8}}
    return NetworkConfig.model_validate(small | fields)


def network(*, num_classes: int = 5, image_size=(32, 48), **fields: Any) -> nn.Module:
    """The model of a section."""
    return build_model(section(**fields), num_classes, image_size=tuple(image_size))
