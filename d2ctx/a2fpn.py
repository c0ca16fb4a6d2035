"""A²-FPN as a Detectron2 backbone: the translation from configuration to keywords."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import nn

from ctxops import build_a2fpn
from d2ctx.backbone import PyramidBackbone
from d2ctx.bottom_up import build_pyramid

_SAME_NAME = (
    "OUT_CHANNELS LATERAL TOP_DOWN BOTTOM_UP GCN CONTEXT_CHANNELS GATE EXTRA_LEVEL OUT_CONV_P2 "
    "NORMALIZE_QUERY ORTHO_WEIGHT REDUCTION_CHANNELS KERNEL_ENCODER KERNEL_UP KERNEL_DOWN "
    "REASSEMBLY"
).split()


def a2fpn_keywords(cfg: CfgNode) -> dict[str, Any]:
    """Keywords of `ctxops.build_a2fpn` that `cfg.MODEL.A2FPN` stands for, but `in_channels`."""
    node = cfg.MODEL.A2FPN
    keywords = {key.lower(): node[key] for key in _SAME_NAME}
    keywords["num_contexts"] = list(node.NUM_CONTEXTS) or None
    return keywords


def build_resnet_a2fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> PyramidBackbone:
    """ResNet or ResNeXt (`MODEL.RESNETS`, `MODEL.CONTEXT_BLOCK`) with A²-FPN (`MODEL.A2FPN`).

    The same switches give PAFPN (`conv`, `nearest`, `conv`) and FPN (`conv`, `nearest`, `none`).

    Args:
        cfg: Configuration after `add_d2ctx_config`.
        input_shape: Channels of the input image.

    Returns:
        A backbone with maps p2, p3, ...

    Raises:
        UserError: If `MODEL.A2FPN` holds a value that the neck cannot be built with.
    """

    def make_neck(in_channels: list[int]) -> nn.Module:
        return build_a2fpn(in_channels=in_channels, **a2fpn_keywords(cfg))

    return build_pyramid(
        cfg, input_shape, make_neck, section="A2FPN", out_channels=cfg.MODEL.A2FPN.OUT_CHANNELS
    )
