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
    "ContextCascadeROIHeads": "cascade",
    "ContextHTC": "htc",
    "ContextPanopticFPN": "meta_arch",
    "ContextProposalNetwork": "meta_arch",
    "ContextRCNN": "meta_arch",
    "ContextResNet": "context_resnet",
    "ContextRetinaNet": "meta_arch",
    "ContextSemanticSegmentor": "meta_arch",
    "HybridTaskROIHeads": "htc",
    "PANetBoxHead": "panet_heads",
    "PANetMaskHead": "panet_heads",
    "PANetROIHeads": "panet_heads",
    "PyramidBackbone": "backbone",
    "SemanticBranch": "semantic_branch",
    "Trainer": "trainer",
    "UserError": "errors",
    "add_d2ctx_config": "config",
    "build_context_resnet_backbone": "bottom_up",
    "build_context_resnet_fpn_backbone": "bottom_up",
    "build_evaluator": "evaluation.build",
    "build_resnet_a2fpn_backbone": "a2fpn",
    "build_resnet_fpt_backbone": "fpt",
    "build_sr_resnet_backbone": "bottom_up",
    "build_sr_resnet_fpn_backbone": "bottom_up",
    "register": "registration",
    "register_coco_format": "datasets",
    "register_datasets": "registration",
}
__all__ = [
    "ContextCascadeROIHeads",
    "ContextHTC",
    "ContextPanopticFPN",
    "ContextProposalNetwork",
    "ContextRCNN",
    "ContextResNet",
    "ContextRetinaNet",
    "ContextSemanticSegmentor",
    "HybridTaskROIHeads",
    "PANetBoxHead",
    "PANetMaskHead",
    "PANetROIHeads",
    "PyramidBackbone",
    "SemanticBranch",
    "Trainer",
    "UserError",
    "add_d2ctx_config",
    "build_context_resnet_backbone",
    "build_context_resnet_fpn_backbone",
    "build_evaluator",
    "build_resnet_a2fpn_backbone",
    "build_resnet_fpt_backbone",
    "build_sr_resnet_backbone",
    "build_sr_resnet_fpn_backbone",
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
