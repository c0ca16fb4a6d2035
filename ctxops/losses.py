"""Losses of label maps, each a sum over valid pixels divided by a count that may be a global one.

Which pixels count is said by the labels alone: a selection (hard pixels, boundary pixels) sets the
labels of the others to `ignore_index`. The count is an argument, because a mean of means is not
the mean where the parts have different numbers of valid pixels: with gradient accumulation or on
several processes pass

    num_valid = mean_over_processes(sum of count_valid(labels) over the accumulated batches)

and do not divide by the number of batches again. Without it, the count is that of the call.
All losses are float32 scalars (float64 for float64 logits), zero where no pixel is valid.

Letters: B batch, K classes, H W map.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ctxops.checks import check_labels, check_map, check_positive
from ctxops.precision import autocast_off, widen

IGNORE_INDEX = 255


def count_valid(labels: Tensor, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Number of pixels that count.

    Args:
        labels: Integers of any shape.
        ignore_index: The label that does not count.

    Returns:
        float32 scalar.
    """
    return (labels != ignore_index).sum().float()


def count_classes(labels: Tensor, num_classes: int, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Number of pixels of every class.

    Args:
        labels: Integers 0..K-1 or `ignore_index`, any shape.
        num_classes: K.
        ignore_index: The label that does not count.

    Returns:
        float32 [K].

    Raises:
        TypeError: If K is not an integer.
        ValueError: If K is not positive.
    """
    check_positive(num_classes, "num_classes")
    counts = torch.stack([(labels == index).sum() for index in range(num_classes)]).float()
    if 0 <= ignore_index < num_classes:
        counts[ignore_index] = 0
    return counts


def mean_over_processes(count: Tensor) -> Tensor:
    """What a process divides its sum by, so that the average of the gradients is the global mean.

    DistributedDataParallel averages gradients over W processes; the global count divided by W
    therefore makes the result that of one process with the whole batch.

    Args:
        count: The count of this process, any shape; left as it is.

    Returns:
        The sum over processes / W, same shape; `count` where no process group is initialised.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return count
    total = count.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def balance_weights(counts: Tensor) -> Tensor:
    """Weight 1 - frequency of every class (the balanced losses of UN-EPT's released code).

    Args:
        counts: Pixels of every class [K], see `count_classes`.

    Returns:
        [K]; zero for a class that holds all pixels, one for all where there are none.
    """
    return 1 - counts / _divisor(counts.sum())


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    num_valid: Tensor | None = None,
    class_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Pixel cross-entropy, the sum over valid pixels of -w_y log softmax(logits)_y, / num_valid.

    Args:
        logits: [B, K, H, W].
        labels: Integers [B, H, W], 0..K-1 or `ignore_index`.
        num_valid: Scalar to divide by, see the head of this file; None: the number of valid pixels,
            or with weights the sum of the weights of their labels.
        class_weights: w, [K].
        ignore_index: The label that does not count.

    Returns:
        Scalar in at least float32.

    Raises:
        TypeError: If `logits` is not floating point, or `labels` not integer.
        ValueError: If the shapes do not fit together.
    """
    check_map(logits, "logits")
    check_labels(labels, "labels", size=(logits.shape[0], *logits.shape[2:]))
    if class_weights is not None and tuple(class_weights.shape) != (logits.shape[1],):
        raise ValueError(
            f"class_weights: expected one per class, [{logits.shape[1]}], got "
            f"{tuple(class_weights.shape)}; pass as many weights as the logits have channels"
        )
    labels = labels.long()
    with autocast_off(logits):
        wide = widen(logits)
        weights = None if class_weights is None else class_weights.to(wide.dtype)
        total = F.cross_entropy(
            wide, labels, weight=weights, ignore_index=ignore_index, reduction="sum"
        )
        if num_valid is None:
            num_valid = _count(labels, weights, ignore_index)
        return total / _divisor(num_valid)


def hard_labels(
    logits: Tensor,
    labels: Tensor,
    *,
    threshold: float = 0.7,
    min_kept: int = 10_000,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Online hard example mining: ignore the pixels that are already right with confidence.

    Kept are pixels whose probability of the true class is at most max(threshold, the `min_kept`-th
    smallest of the batch); all valid ones where there are no more than `min_kept`.

    Args:
        logits: [B, K, H, W]; no gradient flows.
        labels: Integers [B, H, W], 0..K-1 or `ignore_index`.
        threshold: Probability in (0, 1].
        min_kept: Least number of pixels to keep, over the whole batch.
        ignore_index: The label that does not count.

    Returns:
        `labels` with `ignore_index` where a pixel is easy.

    Raises:
        TypeError: If `logits` is not floating point, `labels` or `min_kept` not integer.
        ValueError: If the shapes do not fit, `min_kept` is below 1, or `threshold` no probability.
    """
    with torch.no_grad():
        losses = _pixel_losses(logits, labels, ignore_index)
    return _keep_hard(losses, labels, threshold, min_kept, ignore_index)


def ohem_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    threshold: float = 0.7,
    min_kept: int = 10_000,
    num_valid: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Cross-entropy of the pixels that `hard_labels` keeps.

    For a count over processes call `hard_labels`, count, and call `cross_entropy`.

    Args:
        logits: [B, K, H, W].
        labels: Integers [B, H, W], 0..K-1 or `ignore_index`.
        threshold: As in `hard_labels`.
        min_kept: As in `hard_labels`.
        num_valid: Scalar to divide by; None: the number of kept pixels.
        ignore_index: The label that does not count.

    Returns:
        Scalar in at least float32.

    Raises:
        TypeError: As in `hard_labels`.
        ValueError: As in `hard_labels`.
    """
    losses = _pixel_losses(logits, labels, ignore_index)
    kept = _keep_hard(losses.detach(), labels, threshold, min_kept, ignore_index)
    if num_valid is None:
        num_valid = count_valid(kept, ignore_index=ignore_index)
    return losses.where(kept != ignore_index, 0).sum() / _divisor(num_valid)


def boundary_cross_entropy(
    logits: Tensor,
    boundary: Tensor,
    *,
    num_valid: Tensor | None = None,
    class_counts: Tensor | None = None,
    balance: bool = False,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Boundary or not: binary cross-entropy of one channel, cross-entropy of two (UN-EPT, Eq. 7).

    Args:
        logits: [B, 1, H, W], of boundary; or [B, 2, H, W], of interior and boundary.
        boundary: Integers [B, H, W]: 1 boundary, 0 interior, `ignore_index`.
        num_valid: Scalar to divide by; None: the number of valid pixels, or with `balance` the sum
            of the weights of their labels.
        class_counts: Pixels of both classes, [2], where this is a part of a batch: what is weighted
            and divided by follows from them; None counts here.
        balance: True weights the two classes with 1 - frequency.
        ignore_index: The label that does not count.

    Returns:
        Scalar in at least float32.

    Raises:
        TypeError: If `logits` is not floating point, or `boundary` not integer.
        ValueError: If `logits` has neither one nor two channels, or the shapes do not fit.
    """
    check_map(logits, "logits")
    if logits.shape[1] not in (1, 2):
        raise ValueError(
            f"logits: expected 1 or 2 channels of boundary logits, got {logits.shape[1]} (shape "
            f"{tuple(logits.shape)}); pass the output of the boundary head"
        )
    if logits.shape[1] == 1:
        # softmax of (0, x) is sigmoid(x): the same loss, one code path.
        logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
    if class_counts is None:
        class_counts = count_classes(boundary, 2, ignore_index=ignore_index)
    weights, divisor = _weighting(class_counts, balance)
    num_valid = divisor if num_valid is None else num_valid
    return cross_entropy(
        logits, boundary, num_valid=num_valid, class_weights=weights, ignore_index=ignore_index
    )


def direction_cross_entropy(
    logits: Tensor,
    directions: Tensor,
    *,
    mask: Tensor,
    num_valid: Tensor | None = None,
    class_counts: Tensor | None = None,
    balance: bool = False,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Cross-entropy of the direction bins on boundary pixels (UN-EPT, Sec. 3.2).

    Args:
        logits: [B, 8, H, W].
        directions: Bins [B, H, W], 0..7 or `ignore_index`.
        mask: Bool [B, H, W], where there is a boundary, see `boundary_mask`.
        num_valid: Scalar to divide by; None: the number of valid pixels in the mask, or with
            `balance` the sum of the weights of their labels.
        class_counts: As in `boundary_cross_entropy`, of the bins in the mask, [8].
        balance: True weights the bins with 1 - frequency over those pixels.
        ignore_index: The bin that does not count.

    Returns:
        Scalar in at least float32; zero where no pixel is left.

    Raises:
        TypeError: If `logits` is not floating point, `directions` not integer, `mask` not bool.
        ValueError: If the shapes do not fit together.
    """
    kept = keep_labels(directions, mask, ignore_index=ignore_index)
    if class_counts is None:
        class_counts = count_classes(kept, logits.shape[1], ignore_index=ignore_index)
    weights, divisor = _weighting(class_counts, balance)
    num_valid = divisor if num_valid is None else num_valid
    return cross_entropy(
        logits, kept, num_valid=num_valid, class_weights=weights, ignore_index=ignore_index
    )


def keep_labels(labels: Tensor, mask: Tensor, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Labels inside a mask, `ignore_index` outside.

    Args:
        labels: Integers [B, H, W].
        mask: Bool [B, H, W].
        ignore_index: The label that does not count.

    Returns:
        [B, H, W] in the dtype of `labels`.

    Raises:
        TypeError: If `mask` is not bool.
        ValueError: If the shapes differ.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected bool, got {mask.dtype}; compare with a threshold first")
    if mask.shape != labels.shape:
        raise ValueError(
            f"mask: expected the shape of the labels {tuple(labels.shape)}, got "
            f"{tuple(mask.shape)}; drop a channel axis with mask[:, 0]"
        )
    return labels.masked_fill(~mask, ignore_index)


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Sum of named losses times their weights.

    Args:
        losses: Scalars by name, at least one.
        weights: A weight for every one of them, and no other.

    Returns:
        Scalar.

    Raises:
        ValueError: If the names differ, or there are none.
    """
    if not losses or losses.keys() != weights.keys():
        raise ValueError(
            f"weights: expected one for each of {sorted(losses)}, got {sorted(weights)}; "
            "use weight 0 to switch a loss off"
        )
    return torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()


def _pixel_losses(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """-log softmax(logits)_y of every pixel, 0 for void: [B, H, W] in at least float32."""
    check_map(logits, "logits")
    check_labels(labels, "labels", size=(logits.shape[0], *logits.shape[2:]))
    with autocast_off(logits):
        return F.cross_entropy(
            widen(logits), labels.long(), ignore_index=ignore_index, reduction="none"
        )


def _keep_hard(
    losses: Tensor, labels: Tensor, threshold: float, min_kept: int, ignore_index: int
) -> Tensor:
    """Labels of the pixels whose loss is high enough, see `hard_labels`."""
    check_positive(min_kept, "min_kept")
    if not 0 < threshold <= 1:
        raise ValueError(
            f"threshold: expected a probability in (0, 1], got {threshold}; 0.7 is usual"
        )
    # Void above every probability: where too few pixels are valid, none is above the threshold.
    probability = (-losses).exp().masked_fill(labels == ignore_index, 2.0)
    rank = min(min_kept, probability.numel())
    smallest = probability.flatten().kthvalue(rank).values
    return labels.masked_fill(probability > smallest.clamp(min=threshold), ignore_index)


def _count(labels: Tensor, weights: Tensor | None, ignore_index: int) -> Tensor:
    """Number of valid pixels, or the sum of the weights of their labels."""
    if weights is None:
        return count_valid(labels, ignore_index=ignore_index)
    valid = labels != ignore_index
    return (weights[labels.where(valid, 0)] * valid).sum()


def _weighting(counts: Tensor, balance: bool) -> tuple[Tensor | None, Tensor]:
    """Weights of the classes, and what to divide by, from the pixels of every class."""
    if not balance:
        return None, counts.sum()
    weights = balance_weights(counts)
    return weights, (weights * counts).sum()


def _divisor(count: Tensor) -> Tensor:
    """1 for 0, so that an empty sum divided by it is 0 and has gradient 0."""
    return torch.where(count > 0, count, torch.ones_like(count))
