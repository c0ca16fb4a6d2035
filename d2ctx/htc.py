"""Hybrid Task Cascade: boxes and masks refine each other, stage by stage.

Chen et al., "Hybrid Task Cascade for Instance Segmentation", CVPR 2019: interleaved execution
(section 3.2), mask information flow (3.3), semantic branch (3.4), in the form of the authors' code.

Letters: R RoIs of all images, K classes, C channels, M side of a mask, S stages.
"""

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import (
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
    ROIHeads,
)
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from d2ctx.cascade import ContextCascadeROIHeads
from d2ctx.cascade_stage import label_and_sample
from d2ctx.errors import UserError
from d2ctx.htc_config import htc_keywords
from d2ctx.meta_arch import AuxLossMixin
from d2ctx.semantic_branch import SemanticBranch

EMBEDDING = "semantic"  # name of the branch's embedding among the maps
MISSING_MAPS = (
    "the semantic branch learns from stuff-thing maps, but the data have none; name their folder "
    "as DATASETS.COCO_FORMAT.<data set>.SEM_SEG, or set MODEL.HTC.SEMANTIC.ENABLED False"
)


class HybridTaskROIHeads(ContextCascadeROIHeads):
    """A cascade whose mask heads see refined boxes, earlier mask features and the semantics.

    * Interleaved execution: the mask head of a stage is trained on RoIs that are sampled anew, at
      the stage's IoU, from the boxes that the stage has just refined.
    * Mask information flow: head t takes pooled features plus a 1x1 convolution with ReLU of what
      head t - 1 has before its deconvolution, for the same RoIs; gradients reach earlier heads.
    * Semantic branch, where there is one: its embedding, pooled, is added to the box and mask
      features of every stage.

    Args:
        in_features: Names of the pyramid maps, fine to coarse.
        box_pooler: Makes box features [R, C, h, w] from these maps.
        box_heads: S modules: box features -> what the predictor takes.
        box_predictors: S predictors with class-agnostic boxes.
        samplers: S samplers of `d2ctx.cascade_stage.build_sampler`.
        mask_pooler: Makes mask features.
        mask_heads: S mask heads.
        mask_flow: S - 1 modules, the first between the heads of stages 0 and 1: features before
            the deconvolution -> what is added to the pooled features, [R, C, M / 2, M / 2].
        semantic: Makes the embedding; None: there is no semantic part at all.
        loss_weights: S factors of the stages' losses.
        score_mean: See `ContextCascadeROIHeads`.

    Raises:
        ValueError: If the counts of the parts do not fit together.
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
        mask_pooler: ROIPooler,
        mask_heads: Sequence[MaskRCNNConvUpsampleHead],
        mask_flow: Sequence[nn.Module],
        semantic: SemanticBranch | None = None,
        loss_weights: Sequence[float] = (1.0, 0.5, 0.25),
        score_mean: str = "logits",
    ) -> None:
        super().__init__(
            in_features=in_features,
            box_pooler=box_pooler,
            box_heads=box_heads,
            box_predictors=box_predictors,
            samplers=samplers,
            mask_pooler=mask_pooler,
            mask_heads=mask_heads,
            loss_weights=loss_weights,
            score_mean=score_mean,
        )
        if len(mask_flow) != self.num_stages - 1:
            raise ValueError(
                f"{self.num_stages} mask heads have {self.num_stages - 1} modules between them, "
                f"got {len(mask_flow)}; give as many as mask_flow"
            )
        self.mask_flow = nn.ModuleList(mask_flow)
        self.semantic = semantic

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Keywords of the constructor.

        Args:
            cfg: Configuration after `add_d2ctx_config`.
            input_shape: The pyramid's maps.

        Returns:
            Keyword -> value.

        Raises:
            UserError: If the configuration does not describe a Hybrid Task Cascade.
        """
        return htc_keywords(cfg, input_shape)

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
        semantic_targets: Tensor | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Train or detect.

        Args:
            images: Not used.
            features: Map name -> [B, C, H, W].
            proposals: `proposal_boxes` and `objectness_logits` of each image.
            targets: Ground truth of each image, in training.
            semantic_targets: [B, H, W] labels, in training with a semantic branch.

        Returns:
            In training the proposals and loss name -> scalar; otherwise the detections and {}.

        Raises:
            UserError: If a semantic branch is to be trained without labels.
        """
        if self.semantic is None:
            return super().forward(images, features, proposals, targets)
        if self.training and semantic_targets is None:
            raise UserError(MISSING_MAPS)
        logits, embedding = self.semantic(features)
        maps = {**features, EMBEDDING: embedding}
        instances, losses = super().forward(images, maps, proposals, targets)
        if self.training:
            losses["loss_semantic"] = self.semantic.loss(logits, semantic_targets)
        return instances, losses

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
        if self.semantic is not None:
            features = {**features, EMBEDDING: self.semantic(features)[1]}
        return super().forward_with_given_boxes(features, instances)

    def _mask_rois(
        self,
        sampled: list[Instances],
        refined: list[Instances],
        targets: list[Instances],
        stage: int,
    ) -> list[Instances]:
        """Interleaved execution: RoIs drawn from the boxes that this stage has refined."""
        del sampled
        with get_event_storage().name_scope(f"stage{stage}/mask"):
            return label_and_sample(self.samplers[stage], refined, targets)

    def _box_features(self, features: dict[str, Tensor], boxes: list[Boxes]) -> Tensor:
        return self._with_semantics(super()._box_features(features, boxes), features, boxes)

    def _mask_features(self, features: dict[str, Tensor], boxes: list[Boxes]) -> Tensor:
        return self._with_semantics(super()._mask_features(features, boxes), features, boxes)

    def _with_semantics(
        self, pooled: Tensor, features: dict[str, Tensor], boxes: list[Boxes]
    ) -> Tensor:
        if self.semantic is None:
            return pooled
        return pooled + self.semantic.pool(features[EMBEDDING], boxes, pooled.shape[-2:])

    def _mask_logits(self, pooled: Tensor, stages: Sequence[int]) -> list[Tensor]:
        """Run the heads one after the other, each with what the one before found."""
        logits, x = [], pooled
        for stage in range(max(stages) + 1):
            head = self.mask_head[stage]
            for conv in head.conv_norm_relus:
                x = conv(x)
            if stage in stages:
                logits.append(head.predictor(head.deconv_relu(head.deconv(x))))
            if stage < max(stages):
                x = pooled + self.mask_flow[stage](x)
        return logits


class _SemanticRCNN(GeneralizedRCNN):
    """Generalized R-CNN that hands stuff-thing maps to its heads in training."""

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Train or detect, see `GeneralizedRCNN`; `sem_seg` of each image holds its labels."""
        if not self.training:
            return self.inference(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        targets = [x["instances"].to(self.device) for x in batched_inputs]
        features = self.backbone(images.tensor)
        proposals, losses = self.proposal_generator(images, features, targets)
        _, found = self.roi_heads(
            images, features, proposals, targets, self._semantic_targets(batched_inputs)
        )
        if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
            self.visualize_training(batched_inputs, proposals)
        return {**losses, **found}

    def _semantic_targets(self, batched_inputs: list[dict[str, Any]]) -> Tensor | None:
        """Labels [B, H, W] at the padded size of the batch; None where nothing learns from them."""
        branch = self.roi_heads.semantic
        if branch is None:
            return None
        if any("sem_seg" not in x for x in batched_inputs):
            raise UserError(MISSING_MAPS)
        maps = [x["sem_seg"].to(self.device) for x in batched_inputs]
        divisor = self.backbone.size_divisibility
        return ImageList.from_tensors(maps, divisor, pad_value=branch.ignore_index).tensor


class ContextHTC(AuxLossMixin, _SemanticRCNN):
    """Hybrid Task Cascade with auxiliary backbone losses; its heads are `HybridTaskROIHeads`."""

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Keywords of the constructor, those of `GeneralizedRCNN`.

        Args:
            cfg: Configuration after `add_d2ctx_config`.

        Returns:
            Keyword -> value.

        Raises:
            UserError: If the heads are not those of Hybrid Task Cascade.
        """
        if cfg.MODEL.ROI_HEADS.NAME != HybridTaskROIHeads.__name__:
            raise UserError(
                f"MODEL.META_ARCHITECTURE {cls.__name__} drives {HybridTaskROIHeads.__name__}, got "
                f"MODEL.ROI_HEADS.NAME {cfg.MODEL.ROI_HEADS.NAME}; set it to that, or take "
                "ContextRCNN"
            )
        return super().from_config(cfg)
