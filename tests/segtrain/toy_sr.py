"""Tiny networks of Squeeze Reasoning, one of each kind."""

from typing import Any

import torch
from torch import nn

from segtrain.config.schema import NetworkConfig
from segtrain.models import build_model
from tests.segtrain.toy_network import RESNET, network

DF1 = {"name": "df", "version": 1, "width": 8}
DF2 = {"name": "df", "version": 2, "width": 8}
WIDE = {"name": "wide_resnet38", "width": 4}
CONTEXT = {"name": "context", "channels": 64}
MODULES = ("none", "sr", "se", "nl", "a2", "cgnl", "emau", "rcca", "encoding", "apnb", "gc", "oc")
SR = {"nodes": 4}

# Name -> sections of the model.
KINDS: dict[str, dict[str, Any]] = {
    **{f"context {m}": {"head": CONTEXT | {"module": m}} for m in MODULES},
    "official 2021": {"head": CONTEXT | {"layout": "official_2021"}},
    "official 2024": {"head": CONTEXT | {"layout": "official_2024"}},
    "psp": {"head": {"name": "psp", "channels": 32}},
    "aspp": {"head": {"name": "aspp", "channels": 32, "dilations": [2, 3]}},
    "df 1": {"backbone": DF1, "head": {"name": "df", "channels": 16}, "aux": None},
    "df 2": {"backbone": DF2, "head": {"name": "df", "channels": 16}, "aux": None},
    "srnet": {"backbone": DF2, "head": {"name": "df", "context": "sr", "channels": 16}},
    "df on resnet": {"head": {"name": "df", "context": "sr", "channels": 16, "sr": SR}},
    **{
        f"wide {position}": {
            "backbone": WIDE,
            "head": {
                **{"name": "deeplab_plus", "channels": 16, "low_channels": 8, "sr": SR},
                **{"dilations": [2], "sr_position": position},
            },
        }
        for position in ("none", "after_aspp", "replace_aspp")
    },
    "deeplab on resnet": {"head": {"name": "deeplab_plus", "channels": 16, "sr": SR}},
    "context on df": {"backbone": DF1, "head": CONTEXT},
    "context on wide": {"backbone": WIDE, "head": CONTEXT},
    "sr gate": {"backbone": RESNET | {"widths": [32, 32, 32, 32], "gate": "sr"}, "head": CONTEXT},
    "se gate": {"backbone": RESNET | {"widths": [32, 32, 32, 32], "gate": "se"}, "head": CONTEXT},
}


def toy(kind: str, **changes: Any) -> nn.Module:
    """The network of a kind, with the align_corners of the paper's recipe."""
    torch.manual_seed(0)
    return network(**({"align_corners": True} | KINDS[kind] | changes))


def full_size(backbone: dict, head: dict, *, num_classes: int = 19, **fields: Any) -> nn.Module:
    """A network of the paper's widths, without memory."""
    content = {"name": "network", "backbone": backbone, "head": head} | fields
    with torch.device("meta"):
        return build_model(NetworkConfig.model_validate(content), num_classes, image_size=(64, 64))
