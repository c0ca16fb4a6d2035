"""Detectron2 plug-in: the context modules of `ctxops` as backbones, from YAML.

Importing this package loads nothing: names resolve on first use, so that the installer and the
doctor run where Detectron2 is still missing.
"""

import warnings
from importlib import import_module
from typing import Any

# Detectron2 compiles small functions with torch.jit when it is imported; that it should stop
# is news for its authors, not for every user of every command.
warnings.filterwarnings("ignore", r"`torch\.jit\.script", category=FutureWarning)
warnings.filterwarnings("ignore", r"`torch\.jit\.script", category=DeprecationWarning)

_EXPORTS = {
    "PyramidBackbone": "backbone",
    "Trainer": "trainer",
    "UserError": "errors",
    "add_d2ctx_config": "config",
    "build_evaluator": "evaluation.build",
    "build_resnet_a2fpn_backbone": "a2fpn",
    "register": "registration",
    "register_coco_format": "datasets",
    "register_datasets": "registration",
}
__all__ = [
    "PyramidBackbone",
    "Trainer",
    "UserError",
    "add_d2ctx_config",
    "build_evaluator",
    "build_resnet_a2fpn_backbone",
    "register",
    "register_coco_format",
    "register_datasets",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'd2ctx' has no attribute {name!r}; it has {__all__}")
    try:
        return getattr(import_module(f"d2ctx.{_EXPORTS[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "detectron2":
            raise
        raise ModuleNotFoundError(
            "d2ctx needs Detectron2; install it with: python -m d2ctx.install", name="detectron2"
        ) from error
