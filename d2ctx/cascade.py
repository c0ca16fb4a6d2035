"""Cascade R-CNN as the papers used it: a mask head per stage, RoIs sampled anew at every stage.

Detectron2's `CascadeROIHeads` has one mask head, trained on the first stage's proposals, samples
once, and weights all stages equally. Here, as in mmdetection and in "Cascade R-CNN: High Quality
Object Detection and Instance Segmentation" (Cai, Vasconcelos): box and mask heads at every stage,
512 RoIs sampled at the stage's own IoU, stage losses weighted 1, 1/2, 1/4.

Letters: R RoIs of all images, K classes, C channels, M side of a mask, S stages.
"""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import (
    FastRCNNOutputLayers,
    ROIHeads,
    select_foreground_proposals,
)
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ctxops.precision import widen
from d2ctx.cascade_config import SCORE_MEANS, cascade_keywords
from d2ctx.cascade_stage import as_proposals, label_and_sample, mean_masks, refine
from d2ctx.compat import mask_rcnn_loss


class ContextCascadeROIHeads(nn.Module):
    """S box heads and S mask heads, each stage trained on boxes that the one before refined.

    In training, stage t matches the proposals at its IoU, samples RoIs (ground truth added),
    computes box and mask losses on them, and hands its refined boxes on without gradient. In
    inference, class scores are the mean over the stages, boxes come from the last, and masks are
    the mean of all mask heads' probabilities on the detected boxes.

    Deviation: mmdetection keeps refined boxes without area, Detectron2 and we leave them out.

    Args:
        in_features: Names of the pyramid maps, fine to coarse.
        box_pooler: Makes box features [R, C, h, w] from these maps.
        box_heads: S modules: box features -> what the predictor takes.
        box_predictors: S `FastRCNNOutputLayers` with class-agnostic boxes.
        samplers: S samplers of `d2ctx.cascade_stage.build_sampler`.
        loss_weights: S factors of the stages' losses.
        mask_pooler: Makes mask features; None where there are no masks.
        mask_heads: S `BaseMaskRCNNHead`, or none.
        score_mean: Over what the stages' scores are averaged: "logits", as mmdetection does, or
            "probabilities", as Detectron2 does.

    Raises:
        ValueError: If the counts differ, boxes are not class-agnostic, or `score_mean` is unknown.
    """

    @configurable
    def __init__(
        self,
        *,
        in_features: Sequence[str],
        box_pooler: ROIPooler,
        box_heads: Sequence[nn.Module],
        box_predictors: Sequence[FastRCNNOutputLayers],
        samplers: Sequence[ROIHeads],
        loss_weights: Sequence[float] = (1.0, 0.5, 0.25),
        mask_pooler: ROIPooler | None = None,
        mask_heads: Sequence[nn.Module] = (),
        score_mean: str = "logits",
    ) -> None:
        super().__init__()
        counts = {
            "box_heads": len(box_heads),
            "box_predictors": len(box_predictors),
            "samplers": len(samplers),
            "loss_weights": len(loss_weights),
        }
        if mask_pooler is not None:
            counts["mask_heads"] = len(mask_heads)
        if len(set(counts.values())) != 1:
            raise ValueError(f"every stage needs one of each part, got {counts}; give as many")
        if any(p.bbox_pred.out_features != 4 for p in box_predictors):
            raise ValueError(
                "the boxes of a cascade must be class-agnostic (4 outputs), got "
                f"{[p.bbox_pred.out_features for p in box_predictors]}; set cls_agnostic_bbox_reg"
            )
        if score_mean not in SCORE_MEANS:
            raise ValueError(f"score_mean must be one of {SCORE_MEANS}, got {score_mean!r}")
        self.num_stages = len(box_heads)
        self.num_classes = box_predictors[0].num_classes
        self.loss_weights = tuple(loss_weights)
        self.score_mean = score_mean
        self.box_in_features = self.in_features = list(in_features)
        self.box_pooler = box_pooler
        self.box_head = nn.ModuleList(box_heads)
        self.box_predictor = nn.ModuleList(box_predictors)
        self.samplers = nn.ModuleList(samplers)
        self.mask_on = mask_pooler is not None
        if self.mask_on:
            self.mask_pooler = mask_pooler
            self.mask_head = nn.ModuleList(mask_heads)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Keywords of the constructor.

        Args:
            cfg: Configuration after `add_d2ctx_config`.
            input_shape: The pyramid's maps.

        Returns:
            Keyword -> value.

        Raises:
            UserError: If the configuration does not describe a cascade.
        """
        return cascade_keywords(cfg, input_shape)

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Train or detect, with the arguments of Detectron2's heads.

        Args:
            images: Not used.
            features: Map name -> [B, C, H, W].
            proposals: `proposal_boxes` and `objectness_logits` of each image.
            targets: Ground truth of each image, in training.

        Returns:
            In training the proposals and loss name -> scalar; otherwise the detections and {}.
        """
        features = {name: widen(x) for name, x in features.items()}  # boxes need float32
        if self.training:
            return proposals, self._losses(features, proposals, targets)
        return self._predict_masks(features, self._detect(features, proposals)), {}

    def forward_with_given_boxes(
        self, features: dict[str, Tensor], instances: list[Instances]
    ) -> list[Instances]:
        """Predict masks of known boxes, as test-time augmentation asks for.

        Args:
            features: Map name -> [B, C, H, W].
            instances: `pred_boxes` and `pred_classes` of each image.

        Returns:
            The same instances with `pred_masks` [R_i, 1, M, M], probabilities.
        """
        features = {name: widen(x) for name, x in features.items()}
        return self._predict_masks(features, instances)

    # ---- training ----------------------------------------------------------------------------
    def _losses(
        self, features: dict[str, Tensor], proposals: list[Instances], targets: list[Instances]
    ) -> dict[str, Tensor]:
        losses = {}
        for stage, weight in enumerate(self.loss_weights):
            with get_event_storage().name_scope(f"stage{stage}"):
                sampled = label_and_sample(self.samplers[stage], proposals, targets)
                predictions = self._predict_boxes(features, sampled, stage)
                found = self.box_predictor[stage].losses(predictions, sampled)
                boxes = self.box_predictor[stage].predict_boxes(predictions, sampled)
                proposals = refine(boxes, sampled)
                if self.mask_on:
                    rois = self._mask_rois(sampled, proposals, targets, stage)
                    found["loss_mask"] = self._mask_loss(features, rois, stage)
            losses.update({f"{k}_stage{stage}": weight * loss for k, loss in found.items()})
        return losses

    def _mask_rois(
        self,
        sampled: list[Instances],
        refined: list[Instances],
        targets: list[Instances],
        stage: int,
    ) -> list[Instances]:
        """The labelled RoIs on which the mask head of a stage is trained: those of its boxes."""
        del refined, targets, stage
        return sampled

    def _mask_loss(self, features: dict[str, Tensor], rois: list[Instances], stage: int) -> Tensor:
        positives, _ = select_foreground_proposals(rois, self.num_classes)
        pooled = self._mask_features(features, [p.proposal_boxes for p in positives])
        (logits,) = self._mask_logits(pooled, [stage])
        head = self.mask_head[stage]
        return mask_rcnn_loss(widen(logits), positives, head.vis_period) * head.loss_weight

    # ---- both --------------------------------------------------------------------------------
    def _box_features(self, features: dict[str, Tensor], boxes: list[Boxes]) -> Tensor:
        return self.box_pooler([features[name] for name in self.in_features], boxes)

    def _mask_features(self, features: dict[str, Tensor], boxes: list[Boxes]) -> Tensor:
        return self.mask_pooler([features[name] for name in self.in_features], boxes)

    def _predict_boxes(
        self, features: dict[str, Tensor], proposals: list[Instances], stage: int
    ) -> tuple[Tensor, Tensor]:
        """Class logits [R, K + 1] and box deltas [R, 4] of a stage, in float32."""
        pooled = self._box_features(features, [p.proposal_boxes for p in proposals])
        logits, deltas = self.box_predictor[stage](self.box_head[stage](pooled))
        return widen(logits), widen(deltas)

    def _mask_logits(self, pooled: Tensor, stages: Sequence[int]) -> list[Tensor]:
        """Mask logits [R, K, M, M] of the stages asked for, in rising order."""
        return [self.mask_head[stage].layers(pooled) for stage in stages]

    # ---- inference ---------------------------------------------------------------------------
    def _detect(self, features: dict[str, Tensor], proposals: list[Instances]) -> list[Instances]:
        sizes = [p.image_size for p in proposals]
        outputs = []
        for stage, predictor in enumerate(self.box_predictor):
            predictions = self._predict_boxes(features, proposals, stage)
            outputs.append((predictions, proposals))
            boxes = predictor.predict_boxes(predictions, proposals)
            # None is left out here: the scores of the stages must stay aligned.
            proposals = as_proposals(boxes, sizes)
        instances, _ = fast_rcnn_inference(
            boxes,
            self._mean_scores(outputs),
            sizes,
            predictor.test_score_thresh,
            predictor.test_nms_thresh,
            predictor.test_topk_per_image,
        )
        return instances

    def _mean_scores(
        self, outputs: list[tuple[tuple[Tensor, Tensor], list[Instances]]]
    ) -> list[Tensor]:
        """Class probabilities [R_i, K + 1] of each image, averaged over the stages."""
        if self.score_mean == "logits":
            (_, deltas), proposals = outputs[-1]
            mean = torch.stack([logits for (logits, _), _ in outputs]).mean(dim=0)
            return list(self.box_predictor[-1].predict_probs((mean, deltas), proposals))
        stages = [
            predictor.predict_probs(predictions, proposals)
            for predictor, (predictions, proposals) in zip(self.box_predictor, outputs, strict=True)
        ]
        return [torch.stack(image).mean(dim=0) for image in zip(*stages, strict=True)]

    def _predict_masks(
        self, features: dict[str, Tensor], instances: list[Instances]
    ) -> list[Instances]:
        if not self.mask_on:
            return instances
        pooled = self._mask_features(features, [i.pred_boxes for i in instances])
        logits = self._mask_logits(pooled, range(self.num_stages))
        masks = mean_masks(logits, torch.cat([i.pred_classes for i in instances]))
        for image, mask in zip(instances, masks.split([len(i) for i in instances]), strict=True):
            image.pred_masks = mask
        return instances
