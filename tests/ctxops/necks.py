"""Tiny necks and pyramids for the tests of A²-FPN."""

import torch

from ctxops import build_a2fpn

RESNET50 = (256, 512, 1024, 2048)
IN_CHANNELS = (8, 12, 16, 24)
FPN = {"lateral": "conv", "top_down": "nearest", "bottom_up": "none", "extra_level": "maxpool"}
PAFPN = {**FPN, "bottom_up": "conv", "out_conv_p2": False}
LITE = {"extra_level": "maxpool", "out_conv_p2": False}


def tiny_neck(**changes):
    """A²-FPN, 8 wide."""
    options = {
        "in_channels": IN_CHANNELS,
        "out_channels": 8,
        "num_contexts": [5, 4, 3, 2],
        "context_channels": 8,
        "reduction_channels": 4,
        **changes,
    }
    return build_a2fpn(**options)


def halved(size, times):
    """Height and width after `times` halvings that round up."""
    return tuple(-(-extent // 2**times) for extent in size)


def pyramid(size=(16, 24), *, channels=IN_CHANNELS, batch=1, dtype=torch.float32, device=None):
    """Backbone maps, fine to coarse; `size` is that of the finest one."""
    return [
        torch.randn(batch, c, *halved(size, level), dtype=dtype, device=device)
        for level, c in enumerate(channels)
    ]


def step(neck, features):
    """One training step's gradients: task-like loss and auxiliary losses."""
    outputs = neck(features)
    loss = sum((out * torch.randn_like(out)).sum() for out in outputs)
    (loss + sum(neck.aux_losses().values())).backward()
    return outputs
