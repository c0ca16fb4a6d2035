"""Small networks with UN-EPT's head for tests."""

from typing import Any

import torch
from torch import nn

from segtrain.config.schema import NetworkConfig
from segtrain.config.unept import BoundaryLossConfig
from segtrain.criterion import build_criterion, count_pixels
from segtrain.data.boundary import BoundaryLabels
from segtrain.models import build_model
from tests.segtrain.toy_network import RESNET

VIT = {"name": "vit", "embed_dim": 12, "depth": 3, "num_heads": 3, "blocks": [1, 2, 3]}
SMALL_HEAD = {
    **{"name": "unept", "channels": 16, "num_heads": 2, "points": 2, "ffn_dim": 24},
    **{"encoder_layers": 1, "decoder_layers": 1, "spatial_widths": [4, 8], "dropout": 0.0},
}
# What the released code does otherwise.
RELEASED = {
    **{"self_attention": "released", "query_embedding": "learned", "boundary_classes": 2},
    **{"last_relu": False, "mask_rule": "logit", "refine_at_test": False},
}


def section(*, backbone: dict[str, Any] = RESNET, **head: Any) -> NetworkConfig:
    """The section `model`, with what is given over the small head."""
    content = {"name": "network", "backbone": backbone, "head": SMALL_HEAD | head}
    return NetworkConfig.model_validate(content)


def unept(
    *,
    num_classes: int = 5,
    image_size=(32, 48),
    backbone: dict[str, Any] = RESNET,
    **head: Any,
) -> nn.Module:
    """The model of a section."""
    config = section(backbone=backbone, **head)
    return build_model(config, num_classes, image_size=tuple(image_size))


def stirred(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter drawn anew, norms around one, so that nothing sits at an identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
        for name in ("boundary", "direction"):
            if hasattr(model, "head") and hasattr(model.head, name):
                model.head.get_submodule(name)[1].weight.mul_(10)
    return model


def patches(batch: int, height: int, width: int, *, num_classes: int = 5) -> torch.Tensor:
    """Labels of blocks of random classes and void."""
    shape = (batch, -(-height // 13), -(-width // 13))
    blocks = torch.randint(-1, num_classes, shape) % 256
    labels = blocks.repeat_interleave(13, 1).repeat_interleave(13, 2)
    return labels[:, :height, :width].contiguous()


def with_boundaries(labels: torch.Tensor, **options: int) -> dict[str, torch.Tensor]:
    """Labels by name, as the data workers make them."""
    make = BoundaryLabels(**{"max_distance": 2, "min_area": 9} | options)
    made = [make(label) for label in labels]
    more = {name: torch.stack([one[name] for one in made]) for name in made[0]}
    return {"label": labels} | more


def losses_of(outputs, labels, counts=None, *, share: float = 1.0, **options: Any):
    """What the criterion says; `counts` of a larger batch."""
    from segtrain.config.schema import LossConfig

    config = LossConfig(boundary=BoundaryLossConfig(**options))
    counts = count_pixels([labels]) if counts is None else counts
    return build_criterion(config, share=share)(outputs, labels, counts)
