"""The loss of a step: main and auxiliary logits, divided by the valid pixels of the global batch.

A micro batch gives its part of the loss: sums over its pixels, divided by a count that is the same
for all parts of the step. Parts therefore add up to the mean over the global batch, however it is
split over processes and accumulated forward passes.

Letters: B images of a micro batch, K classes, H W image, h w map.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ctxops.losses import count_valid, cross_entropy, hard_labels
from ctxops.precision import widen
from ctxops.resize import resize_bilinear

if TYPE_CHECKING:
    from segtrain.config.schema import LossConfig

Criterion = Callable[[Mapping[str, Any], Tensor, Tensor], dict[str, Tensor]]


def build_criterion(config: "LossConfig", *, share: float = 1.0) -> Criterion:
    """Build the loss of a run.

    Args:
        config: The section `loss`.
        share: Images of a micro batch / images of the global batch.

    Returns:
        A function (outputs of the model, labels [B, H, W], number of valid pixels) -> the terms,
        whose sum is what to differentiate.
    """
    main: Callable[..., Tensor] = cross_entropy
    if config.kind == "ohem":
        main = partial(
            mined_cross_entropy,
            threshold=config.ohem_threshold,
            min_kept=max(1, round(config.ohem_min_kept * share)),
        )
    return partial(segmentation_losses, main=main, aux_weight=config.aux_weight)


def segmentation_losses(
    outputs: Mapping[str, Any],
    labels: Tensor,
    num_valid: Tensor,
    *,
    main: Callable[..., Tensor] = cross_entropy,
    aux_weight: float = 0.4,
) -> dict[str, Tensor]:
    """Loss of the logits, and of every auxiliary head: weight x cross-entropy.

    Args:
        outputs: "logits" [B, K, H, W]; "aux", if there, a list of logits [B, K, h, w].
        labels: Integers [B, H, W].
        num_valid: Scalar to divide by.
        main: Loss of "logits", a function (logits, labels, num_valid=...).
        aux_weight: Weight of each auxiliary loss; 0 leaves them out.

    Returns:
        "loss_seg" and "loss_aux", "loss_aux1" ..., scalars.
    """
    losses = {"loss_seg": main(outputs["logits"], labels, num_valid=num_valid)}
    aux: Sequence[Tensor] = outputs.get("aux", ()) if aux_weight else ()
    for index, logits in enumerate(aux):
        full = resize_bilinear(widen(logits), labels.shape[1:], align_corners=False)
        name = f"loss_aux{index or ''}"
        losses[name] = aux_weight * cross_entropy(full, labels, num_valid=num_valid)
    return losses


def mined_cross_entropy(
    logits: Tensor, labels: Tensor, *, num_valid: Tensor, threshold: float, min_kept: int
) -> Tensor:
    """Mean cross-entropy of the hard pixels, weighted by the share of this batch.

    Which pixels are hard is decided within a micro batch, and their number is known only after its
    forward pass: the mean over them counts as much as the micro batch has valid pixels. Only this
    loss therefore depends, a little, on how the global batch is split.

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
