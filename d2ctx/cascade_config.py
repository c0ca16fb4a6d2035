"""From configuration to the keywords of `ContextCascadeROIHeads`."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import (
    FastRCNNOutputLayers,
    ROIHeads,
    build_box_head,
    build_mask_head,
)

from d2ctx.cascade_stage import build_sampler
from d2ctx.errors import UserError

SCORE_MEANS = ("logits", "probabilities")


def cascade_keywords(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
    """Keywords of `ContextCascadeROIHeads`.

    Args:
        cfg: Configuration after `add_d2ctx_config`.
        input_shape: The pyramid's maps.

    Returns:
        Keyword -> value.

    Raises:
        UserError: If the configuration does not describe a cascade, with the key to change.
    """
    _check(cfg, input_shape)
    cascade = cfg.MODEL.ROI_BOX_CASCADE_HEAD
    box_pooler, box_shape = build_pooler(cfg, cfg.MODEL.ROI_BOX_HEAD, input_shape)
    box_heads = [build_box_head(cfg, box_shape) for _ in cascade.IOUS]
    keywords = {
        "in_features": cfg.MODEL.ROI_HEADS.IN_FEATURES,
        "box_pooler": box_pooler,
        "box_heads": box_heads,
        "box_predictors": [
            FastRCNNOutputLayers(
                cfg, head.output_shape, box2box_transform=Box2BoxTransform(weights=weights)
            )
            for head, weights in zip(box_heads, cascade.BBOX_REG_WEIGHTS, strict=True)
        ],
        "samplers": [_sampler(cfg, iou) for iou in cascade.IOUS],
        "loss_weights": cfg.MODEL.CASCADE.LOSS_WEIGHTS,
        "score_mean": cfg.MODEL.CASCADE.SCORE_MEAN,
    }
    if cfg.MODEL.MASK_ON:
        mask_pooler, mask_shape = build_pooler(cfg, cfg.MODEL.ROI_MASK_HEAD, input_shape)
        keywords["mask_pooler"] = mask_pooler
        keywords["mask_heads"] = [build_mask_head(cfg, mask_shape) for _ in cascade.IOUS]
    return keywords


def _sampler(cfg: CfgNode, iou: float) -> ROIHeads:
    node = cfg.MODEL.ROI_HEADS
    return build_sampler(
        num_classes=node.NUM_CLASSES,
        iou=iou,
        batch_size_per_image=node.BATCH_SIZE_PER_IMAGE,
        positive_fraction=node.POSITIVE_FRACTION,
        append_ground_truth=node.PROPOSAL_APPEND_GT,
    )


def build_pooler(
    cfg: CfgNode, head: CfgNode, input_shape: dict[str, ShapeSpec]
) -> tuple[ROIPooler, ShapeSpec]:
    """Build the pooler of a head.

    Args:
        cfg: Configuration; `MODEL.ROI_HEADS.IN_FEATURES` names the maps.
        head: `MODEL.ROI_BOX_HEAD` or `MODEL.ROI_MASK_HEAD`.
        input_shape: The pyramid's maps.

    Returns:
        The pooler, and the shape of what it makes.
    """
    names, side = cfg.MODEL.ROI_HEADS.IN_FEATURES, head.POOLER_RESOLUTION
    pooler = ROIPooler(
        output_size=side,
        scales=tuple(1.0 / input_shape[name].stride for name in names),
        sampling_ratio=head.POOLER_SAMPLING_RATIO,
        pooler_type=head.POOLER_TYPE,
    )
    return pooler, ShapeSpec(channels=input_shape[names[0]].channels, height=side, width=side)


def _check(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> None:
    """Refuse what a cascade cannot be built from.

    Raises:
        UserError: With the key to change.
    """
    model, names = cfg.MODEL, cfg.MODEL.ROI_HEADS.IN_FEATURES
    counts = {
        "ROI_BOX_CASCADE_HEAD.IOUS": len(model.ROI_BOX_CASCADE_HEAD.IOUS),
        "ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": len(model.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS),
        "CASCADE.LOSS_WEIGHTS": len(model.CASCADE.LOSS_WEIGHTS),
    }
    if len(set(counts.values())) != 1:
        raise UserError(f"MODEL needs one value per cascade stage, got {counts}; give as many")
    if absent := [name for name in names if name not in input_shape]:
        raise UserError(
            f"MODEL.ROI_HEADS.IN_FEATURES names {absent}, but the backbone gives "
            f"{list(input_shape)}; name some of these"
        )
    if not model.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
        raise UserError(
            f"{model.ROI_HEADS.NAME} refines class-agnostic boxes; set "
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG True"
        )
    if model.KEYPOINT_ON:
        raise UserError(f"{model.ROI_HEADS.NAME} has no keypoint head; set MODEL.KEYPOINT_ON False")
    if model.CASCADE.SCORE_MEAN not in SCORE_MEANS:
        raise UserError(
            f"MODEL.CASCADE.SCORE_MEAN must be one of {', '.join(SCORE_MEANS)}, got "
            f"{model.CASCADE.SCORE_MEAN!r}"
        )
