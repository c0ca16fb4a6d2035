"""From configuration to the keywords of `HybridTaskROIHeads`."""

import logging
from typing import Any

import fvcore.nn.weight_init as weight_init
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import MaskRCNNConvUpsampleHead
from detectron2.utils.logger import log_first_n
from torch import nn

from d2ctx.cascade_config import cascade_keywords
from d2ctx.errors import UserError
from d2ctx.semantic_branch import SemanticBranch

META_ARCHITECTURE = "ContextHTC"  # the one that hands the stuff-thing maps on


def htc_keywords(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
    """Keywords of `HybridTaskROIHeads`.

    Args:
        cfg: Configuration after `add_d2ctx_config`.
        input_shape: The pyramid's maps.

    Returns:
        Keyword -> value.

    Raises:
        UserError: If the configuration does not describe a Hybrid Task Cascade.
    """
    if not cfg.MODEL.MASK_ON:
        raise UserError(f"{cfg.MODEL.ROI_HEADS.NAME} needs masks; set MODEL.MASK_ON True")
    keywords = cascade_keywords(cfg, input_shape)
    heads = keywords["mask_heads"]
    if not isinstance(heads[0], MaskRCNNConvUpsampleHead):
        raise UserError(
            f"{cfg.MODEL.ROI_HEADS.NAME} hands on what a mask head has before its deconvolution; "
            f"{cfg.MODEL.ROI_MASK_HEAD.NAME} has none, set MODEL.ROI_MASK_HEAD.NAME "
            "MaskRCNNConvUpsampleHead"
        )
    channels = input_shape[keywords["in_features"][0]].channels
    # The first head has no predecessor; a module for it would never get a gradient.
    keywords["mask_flow"] = [_flow(head.deconv.in_channels, channels) for head in heads[1:]]
    keywords["semantic"] = build_semantic_branch(cfg, input_shape, embed_dim=channels)
    return keywords


def build_semantic_branch(
    cfg: CfgNode, input_shape: dict[str, ShapeSpec], *, embed_dim: int
) -> SemanticBranch | None:
    """Build the semantic branch of `MODEL.HTC.SEMANTIC`; None, told once, where it is off.

    Args:
        cfg: Configuration after `add_d2ctx_config`.
        input_shape: The pyramid's maps.
        embed_dim: Channels of the RoI features.

    Returns:
        The branch, or None.

    Raises:
        UserError: If a map is absent, or nothing would hand the stuff-thing maps to the branch.
    """
    node = cfg.MODEL.HTC.SEMANTIC
    if not node.ENABLED:
        log_first_n(
            logging.INFO,
            "Hybrid Task Cascade without its semantic branch (MODEL.HTC.SEMANTIC.ENABLED False): "
            "no stuff-thing maps are read",
            name=__name__,
            key="message",
        )
        return None
    if cfg.MODEL.META_ARCHITECTURE != META_ARCHITECTURE:
        raise UserError(
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} does not hand stuff-thing maps "
            f"to the semantic branch; set it to {META_ARCHITECTURE}, or set "
            "MODEL.HTC.SEMANTIC.ENABLED False"
        )
    try:
        return SemanticBranch(
            input_shape=input_shape,
            in_features=node.IN_FEATURES,
            common_feature=node.COMMON_FEATURE,
            num_classes=node.NUM_CLASSES,
            embed_dim=embed_dim,
            width=node.CONV_DIM,
            num_convs=node.NUM_CONV,
            ignore_index=node.IGNORE_VALUE,
            loss_weight=node.LOSS_WEIGHT,
            pooler=_pooler(cfg, input_shape),
        )
    except ValueError as error:
        raise UserError(f"MODEL.HTC.SEMANTIC: {error}") from error


def _pooler(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> ROIPooler:
    node, head = cfg.MODEL.HTC.SEMANTIC, cfg.MODEL.ROI_MASK_HEAD
    if node.COMMON_FEATURE not in input_shape:
        raise ValueError(
            f"COMMON_FEATURE must be a map of the backbone, {list(input_shape)}, got "
            f"{node.COMMON_FEATURE!r}"
        )
    return ROIPooler(
        output_size=node.POOLER_RESOLUTION,
        scales=(1.0 / input_shape[node.COMMON_FEATURE].stride,),
        sampling_ratio=head.POOLER_SAMPLING_RATIO,
        pooler_type=head.POOLER_TYPE,
    )


def _flow(in_channels: int, out_channels: int) -> Conv2d:
    conv = Conv2d(in_channels, out_channels, kernel_size=1, activation=nn.ReLU())
    weight_init.c2_msra_fill(conv)
    return conv
