"""A²-FPN as a Detectron2 backbone: the translation from configuration to keywords."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_resnet_backbone

from ctxops import build_a2fpn
from d2ctx.backbone import PyramidBackbone
from d2ctx.errors import UserError

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
    """ResNet or ResNeXt (`MODEL.RESNETS`) with the A²-FPN neck (`MODEL.A2FPN`).

    The same switches give PAFPN (`conv`, `nearest`, `conv`) and FPN (`conv`, `nearest`, `none`).

    Args:
        cfg: Configuration after `add_d2ctx_config`.
        input_shape: Channels of the input image.

    Returns:
        A backbone with maps p2, p3, ...

    Raises:
        UserError: If `MODEL.A2FPN` holds a value that the neck cannot be built with.
    """
    bottom_up = build_resnet_backbone(cfg, input_shape)
    shapes = bottom_up.output_shape()
    in_features = cfg.MODEL.A2FPN.IN_FEATURES
    if absent := [name for name in in_features if name not in shapes]:
        raise UserError(
            f"MODEL.A2FPN.IN_FEATURES names {absent}, but MODEL.RESNETS.OUT_FEATURES gives "
            f"{list(shapes)}; name some of these"
        )
    try:
        neck = build_a2fpn(
            in_channels=[shapes[name].channels for name in in_features], **a2fpn_keywords(cfg)
        )
        return PyramidBackbone(
            bottom_up=bottom_up,
            neck=neck,
            in_features=in_features,
            out_channels=cfg.MODEL.A2FPN.OUT_CHANNELS,
            num_outputs=len(in_features) + 1,
        )
    except ValueError as error:
        raise UserError(f"MODEL.A2FPN: {error}") from error
