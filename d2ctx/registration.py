"""The one place where our parts enter Detectron2's registries."""

from detectron2.config import CfgNode
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
)

from d2ctx import bottom_up, meta_arch
from d2ctx.a2fpn import build_resnet_a2fpn_backbone
from d2ctx.cascade import ContextCascadeROIHeads
from d2ctx.cityscapes_data import register_cityscapes
from d2ctx.datasets import register_coco_format
from d2ctx.fpt import build_resnet_fpt_backbone
from d2ctx.htc import ContextHTC, HybridTaskROIHeads
from d2ctx.panet_heads import PANetBoxHead, PANetMaskHead, PANetROIHeads
from d2ctx.panoptic_data import register_coco_panoptic

BACKBONES = (
    build_resnet_a2fpn_backbone,
    build_resnet_fpt_backbone,
    bottom_up.build_context_resnet_backbone,
    bottom_up.build_context_resnet_fpn_backbone,
    bottom_up.build_sr_resnet_backbone,
    bottom_up.build_sr_resnet_fpn_backbone,
)


def register() -> None:
    """Register our backbones, heads and meta-architectures; calling it again changes nothing."""
    for builder in BACKBONES:
        _register_once(BACKBONE_REGISTRY, builder)
    for name in meta_arch.__all__:
        _register_once(META_ARCH_REGISTRY, getattr(meta_arch, name))
    _register_once(META_ARCH_REGISTRY, ContextHTC)
    for heads in (ContextCascadeROIHeads, HybridTaskROIHeads, PANetROIHeads):
        _register_once(ROI_HEADS_REGISTRY, heads)
    _register_once(ROI_BOX_HEAD_REGISTRY, PANetBoxHead)
    _register_once(ROI_MASK_HEAD_REGISTRY, PANetMaskHead)


def register_datasets(cfg: CfgNode) -> None:
    """Register the data sets that a configuration defines; calling it again changes nothing.

    Args:
        cfg: A configuration with our nodes, see `d2ctx.add_d2ctx_config`.

    Raises:
        UserError: On an invalid definition, or a name that is taken.
    """
    register_coco_format(cfg)
    register_coco_panoptic(cfg)
    register_cityscapes(cfg)


def _register_once(registry, part) -> None:
    if part.__name__ not in registry:
        registry.register(part)
