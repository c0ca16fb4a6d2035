"""The steps between the stages of a cascade: sampling RoIs, refining boxes, averaging outputs.

Letters: R RoIs of all images, K classes, M side of a mask.
"""

from collections.abc import Sequence

import torch
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import ROIHeads
from detectron2.structures import Boxes, Instances
from torch import Tensor

# Field of a proposal: whether it is a ground-truth box that the sampling added.
APPENDED = "is_appended"


def build_sampler(
    *,
    num_classes: int,
    iou: float,
    batch_size_per_image: int = 512,
    positive_fraction: float = 0.25,
    append_ground_truth: bool = True,
) -> ROIHeads:
    """Build Detectron2's matcher and sampler of one stage.

    Args:
        num_classes: K.
        iou: Proposals that overlap a ground-truth box at least this much are positive, all
            others negative.
        batch_size_per_image: RoIs that an image gives at most.
        positive_fraction: Largest share of positives among them.
        append_ground_truth: Whether ground-truth boxes are sampled too.

    Returns:
        A sampler for `label_and_sample`; it has no parameters.
    """
    return ROIHeads(
        num_classes=num_classes,
        batch_size_per_image=batch_size_per_image,
        positive_fraction=positive_fraction,
        proposal_matcher=Matcher([iou], [0, 1], allow_low_quality_matches=False),
        proposal_append_gt=append_ground_truth,
    )


def label_and_sample(
    sampler: ROIHeads, proposals: list[Instances], targets: list[Instances]
) -> list[Instances]:
    """Match proposals to the ground truth and draw the RoIs that a stage trains on.

    Args:
        sampler: Of `build_sampler`.
        proposals: `proposal_boxes` and `objectness_logits` of each image.
        targets: The ground truth of each image.

    Returns:
        The sampled proposals of each image with the fields of their targets and `APPENDED`.
    """
    marked = [_with_mark(p, value=False) for p in proposals]
    # Detectron2 appends the ground truth with all fields that the proposals have.
    truths = [_with_mark(t, value=True) for t in targets]
    return sampler.label_and_sample_proposals(marked, truths)


def _with_mark(instances: Instances, *, value: bool) -> Instances:
    """The same fields in a new container, and the mark."""
    fields = dict(instances.get_fields())
    boxes = fields["gt_boxes"] if value else fields["proposal_boxes"]
    fields[APPENDED] = torch.full((len(boxes),), value, device=boxes.device)
    return Instances(instances.image_size, **fields)


def as_proposals(
    boxes: Sequence[Tensor], image_sizes: Sequence[tuple[int, int]]
) -> list[Instances]:
    """Turn predicted boxes into proposals: without gradient, cut at the image border.

    Args:
        boxes: [R_i, 4] of each image, corners in pixels.
        image_sizes: (height, width) of each image.

    Returns:
        Instances with `proposal_boxes` and `objectness_logits` (zeros).
    """
    proposals = []
    for box, size in zip(boxes, image_sizes, strict=True):
        clipped = Boxes(box.detach())
        clipped.clip(size)
        logits = box.new_zeros(len(box))
        proposals.append(Instances(size, proposal_boxes=clipped, objectness_logits=logits))
    return proposals


def refine(boxes: Sequence[Tensor], sampled: list[Instances]) -> list[Instances]:
    """The proposals of the next stage: refined boxes without those that began as ground truth.

    The next sampling adds the ground truth again; a refined copy beside it would only be an easy
    positive. Boxes that shrank to nothing are left out.

    Args:
        boxes: [R_i, 4] of each image, the refined boxes of `sampled`.
        sampled: What `label_and_sample` returned.

    Returns:
        Proposals of each image, at most as many as were sampled.
    """
    proposals = as_proposals(boxes, [s.image_size for s in sampled])
    return [
        p[p.proposal_boxes.nonempty() & ~s.get(APPENDED)]
        for p, s in zip(proposals, sampled, strict=True)
    ]


def mean_masks(stage_logits: Sequence[Tensor], classes: Tensor) -> Tensor:
    """Mean over stages of the mask probabilities of given classes.

    Args:
        stage_logits: Of each stage [R, K, M, M], or [R, 1, M, M] where masks know no classes.
        classes: [R], integer.

    Returns:
        [R, 1, M, M] in float32.
    """
    agnostic = stage_logits[0].shape[1] == 1
    column = torch.zeros_like(classes) if agnostic else classes
    rows = torch.arange(len(classes), device=classes.device)
    chosen = [logits[rows, column].float().sigmoid() for logits in stage_logits]
    return torch.stack(chosen).mean(dim=0)[:, None]
