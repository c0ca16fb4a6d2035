"""The loss of a step: main and auxiliary logits, divided by the valid pixels of the global batch.

A micro batch gives its part of the loss: sums over its pixels, divided by a count that is the same
for all parts of the step. Parts therefore add up to the mean over the global batch, however it is
split over processes and accumulated forward passes.

Labels come by name: "label", and of runs with `loss.boundary` "boundary" and "direction"; so do the
counts, see `count_pixels`.

Letters: B images of a micro batch, K classes, H W image.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctxops.boundary import NUM_DIRECTIONS, boundary_mask
from ctxops.losses import (
    boundary_cross_entropy,
    count_classes,
    count_valid,
    cross_entropy,
    direction_cross_entropy,
    hard_labels,
    keep_labels,
)
from segtrain import dist

if TYPE_CHECKING:
    from segtrain.config.schema import LossConfig
    from segtrain.config.unept import BoundaryLossConfig

LABELS = ("label", "boundary", "direction")
Labels = Mapping[str, Tensor]
Counts = Mapping[str, Tensor]
Criterion = Callable[[Mapping[str, Any], Labels, Counts], dict[str, Tensor]]


def build_criterion(config: "LossConfig", *, share: float = 1.0) -> Criterion:
    """Build the loss of a run.

    Args:
        config: The section `loss`.
        share: Images of a micro batch / images of the global batch.

    Returns:
        A function (outputs of the model, labels [B, H, W] by name, counts of the global batch) ->
        the terms, whose sum is what to differentiate.
    """
    main: Callable[..., Tensor] = cross_entropy
    if config.kind == "ohem":
        main = partial(
            mined_cross_entropy,
            threshold=config.ohem_threshold,
            min_kept=max(1, round(config.ohem_min_kept * share)),
        )
    return partial(_losses, main=main, aux_weight=config.aux_weight, boundary=config.boundary)


def count_pixels(parts: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """What the losses of an update are divided by; a call of all processes.

    The average of the gradients over W processes shall be the mean over the global batch: counts
    are summed over the processes and divided by W.

    Args:
        parts: Micro batches of this process: "label" and, where the run has them, "boundary" and
            "direction".

    Returns:
        "label": valid pixels; "boundary": pixels of both classes [2]; "direction": pixels of every
        bin on boundaries [8].
    """
    own = [_count(part) for part in parts]
    return {
        name: dist.sum_over_processes(torch.stack([one[name] for one in own]).sum(0))
        / dist.world_size()
        for name in own[0]
    }


def _count(labels: Mapping[str, Any]) -> dict[str, Tensor]:
    counts = {"label": count_valid(labels["label"])}
    if "boundary" in labels:
        counts["boundary"] = count_classes(labels["boundary"], 2)
        kept = keep_labels(labels["direction"], labels["boundary"] == 1)
        counts["direction"] = count_classes(kept, NUM_DIRECTIONS)
    return counts


def _losses(
    outputs: Mapping[str, Any],
    labels: Labels,
    counts: Counts,
    *,
    main: Callable[..., Tensor],
    aux_weight: float,
    boundary: "BoundaryLossConfig | None",
) -> dict[str, Tensor]:
    num_valid = counts["label"]
    losses = segmentation_losses(
        outputs, labels["label"], num_valid, main=main, aux_weight=aux_weight
    )
    if boundary is None:
        return losses
    refined = main(outputs["refined"], labels["label"], num_valid=num_valid)
    losses["loss_seg"] = boundary.seg_weight * losses["loss_seg"]
    losses["loss_refined"] = boundary.refined_weight * refined
    return losses | boundary_losses(outputs, labels, counts, boundary)


def segmentation_losses(
    outputs: Mapping[str, Any],
    labels: Tensor,
    num_valid: Tensor,
    *,
    main: Callable[..., Tensor] = cross_entropy,
    aux_weight: float = 0.4,
) -> dict[str, Tensor]:
    """Loss of the logits, and weight x the same loss of every auxiliary head's.

    Args:
        outputs: "logits" [B, K, H, W]; "aux", if there, a list of such logits.
        labels: Integers [B, H, W].
        num_valid: Scalar to divide by.
        main: Loss of logits, a function (logits, labels, num_valid=...).
        aux_weight: Weight of each auxiliary loss; 0 leaves them out.

    Returns:
        "loss_seg" and "loss_aux", "loss_aux1" ..., scalars.
    """
    losses = {"loss_seg": main(outputs["logits"], labels, num_valid=num_valid)}
    aux: Sequence[Tensor] = outputs.get("aux", ()) if aux_weight else ()
    for index, logits in enumerate(aux):
        losses[f"loss_aux{index or ''}"] = aux_weight * main(logits, labels, num_valid=num_valid)
    return losses


def boundary_losses(
    outputs: Mapping[str, Tensor], labels: Labels, counts: Counts, config: "BoundaryLossConfig"
) -> dict[str, Tensor]:
    """Boundary or not, and on boundary pixels the direction to the interior (UN-EPT, Eq. 7).

    Where the prediction says what is boundary, the number of those pixels is known only after the
    forward pass: as in `mined_cross_entropy`, their mean counts as much as the micro batch has
    valid pixels. All else does not depend on how the global batch is split.

    Args:
        outputs: "boundary" [B, 1 or 2, H, W] and "direction" [B, 8, H, W], logits.
        labels: "label", "boundary" and "direction", integers [B, H, W].
        counts: As `count_pixels`, of the global batch (/ processes).
        config: The section `loss.boundary`.

    Returns:
        "loss_boundary" and "loss_direction", scalars.
    """
    boundary = boundary_cross_entropy(
        outputs["boundary"],
        labels["boundary"],
        class_counts=counts["boundary"],
        balance=config.balance,
    )
    mask, bins = labels["boundary"] == 1, counts["direction"]
    if config.direction_mask == "predicted":
        mask = boundary_mask(outputs["boundary"])
        kept = count_classes(keep_labels(labels["direction"], mask), NUM_DIRECTIONS)
        bins = kept * counts["label"] / count_valid(labels["label"]).clamp(min=1)
    direction = direction_cross_entropy(
        outputs["direction"],
        labels["direction"],
        mask=mask,
        class_counts=bins,
        balance=config.balance,
    )
    return {
        "loss_boundary": config.boundary_weight * boundary,
        "loss_direction": config.direction_weight * direction,
    }


def mined_cross_entropy(
    logits: Tensor, labels: Tensor, *, num_valid: Tensor, threshold: float, min_kept: int
) -> Tensor:
    """Mean cross-entropy of the hard pixels, weighted by the share of this batch.

    Which pixels are hard is decided within a micro batch, and their number is known only after its
    forward pass: the mean over them counts as much as the micro batch has valid pixels. This loss
    therefore depends, a little, on how the global batch is split.

    Args:
        logits: [B, K, H, W].
        labels: Integers [B, H, W].
        num_valid: Scalar: valid pixels of the global batch (/ processes).
        threshold: As in `ctxops.hard_labels`.
        min_kept: As in `ctxops.hard_labels`.

    Returns:
        Scalar.
    """
    kept = hard_labels(logits, labels, threshold=threshold, min_kept=min_kept)
    valid = count_valid(labels).clamp(min=1)
    return cross_entropy(logits, kept, num_valid=count_valid(kept) * num_valid / valid)
