"""Confusion matrix of a whole split, and the scores that follow from it.

Letters: K classes, g ground truth, p prediction, C[g, p] pixels of class g predicted as p.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from segtrain.data.labels import IGNORE_INDEX
from segtrain.dist import sum_over_processes
from segtrain.errors import UserError
from segtrain.wording import first_of

_BYTE = 256


@dataclass(frozen=True)
class Scores:
    """Scores from 0 to 1; NaN where nothing was there to be scored.

    Attributes:
        miou: Mean of the IoU over the classes with pixels in ground truth or prediction.
        pixel_accuracy: Share of the pixels whose class is right.
        mean_accuracy: Mean recall of the classes in the ground truth.
        fw_iou: IoU of each class, weighted with its share of the ground truth.
        iou: IoU of each class. A class that is predicted only has 0, one that is absent from both
            sides NaN.
        accuracy: Recall of each class.
        num_pixels: Pixels that count.
        num_void: Pixels whose ground truth is void.
    """

    miou: float
    pixel_accuracy: float
    mean_accuracy: float
    fw_iou: float
    iou: tuple[float, ...]
    accuracy: tuple[float, ...]
    num_pixels: int
    num_void: int


@dataclass
class ConfusionMatrix:
    """Counts that grow image by image; two of them add up.

    Args:
        num_classes: K, at most 255.

    Raises:
        ValueError: If K is not in 1..255.
    """

    num_classes: int
    counts: NDArray[np.int64] = field(init=False)
    num_void: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if not 1 <= self.num_classes <= IGNORE_INDEX:
            raise ValueError(f"num_classes must be in 1..255, got {self.num_classes}")
        self.counts = np.zeros((self.num_classes, self.num_classes), np.int64)

    def update(self, prediction: Any, label: Any, *, name: str = "the label map") -> None:
        """Count one image or batch.

        Args:
            prediction: Classes 0..K-1, an integer array or tensor [H, W] or [B, H, W].
            label: Ground truth of the same shape: 0..K-1, or 255 for void.
            name: The image, for messages.

        Raises:
            TypeError: If one of them does not hold integers.
            UserError: If shapes differ or a value is neither a class nor, in the ground truth, 255.
        """
        predicted = as_bytes(prediction, f"{name}: prediction")
        truth = as_bytes(label, f"{name}: ground truth")
        if predicted.shape != truth.shape:
            raise UserError(
                f"{name}: the prediction has size {predicted.shape}, the ground truth "
                f"{truth.shape}; predict at the size of the ground truth"
            )
        # All pairs of bytes in one pass: what is no class shows up in its own row or column.
        pairs = (truth.astype(np.uint16) << 8) | predicted
        table = np.bincount(pairs.ravel(), minlength=_BYTE * _BYTE).reshape(_BYTE, _BYTE)
        self._check(table.sum(axis=0), f"{name}: prediction", "")
        self._check(table[:IGNORE_INDEX].sum(axis=1), f"{name}: ground truth", ", or 255 for void")
        self.counts += table[: self.num_classes, : self.num_classes]
        self.num_void += int(table[IGNORE_INDEX].sum())

    def merge(self, other: "ConfusionMatrix") -> None:
        """Add the counts of another matrix.

        Args:
            other: A matrix of as many classes.

        Raises:
            ValueError: If it has another number of classes.
        """
        if other.num_classes != self.num_classes:
            raise ValueError(
                f"cannot add a matrix of {other.num_classes} classes to one of "
                f"{self.num_classes}; count both with the same classes"
            )
        self.counts += other.counts
        self.num_void += other.num_void

    def all_reduce(self, device: torch.device | str = "cpu") -> None:
        """Replace the counts by their sum over all processes, on every process.

        Args:
            device: Where the processes communicate: the GPU for NCCL.
        """
        self.counts = sum_of_counts(self.counts, device)
        self.num_void = int(sum_of_counts(np.asarray(self.num_void), device))

    def scores(self) -> Scores:
        """The scores of what was counted so far.

        Returns:
            All of them, from 0 to 1.
        """
        right = np.diagonal(self.counts).astype(np.float64)
        truth, predicted = self.counts.sum(axis=1), self.counts.sum(axis=0)
        total = int(self.counts.sum())
        iou = fraction(right, truth + predicted - np.diagonal(self.counts))
        accuracy = fraction(right, truth)
        weighted = np.nansum(np.where(truth > 0, truth * iou, 0.0))
        return Scores(
            miou=mean_of_known(iou),
            pixel_accuracy=float(fraction(right.sum(), total)),
            mean_accuracy=mean_of_known(accuracy),
            fw_iou=float(weighted / total) if total else float("nan"),
            iou=tuple(map(float, iou)),
            accuracy=tuple(map(float, accuracy)),
            num_pixels=total,
            num_void=self.num_void,
        )

    def _check(self, histogram: NDArray[np.int64], what: str, more: str) -> None:
        wrong = np.flatnonzero(histogram[self.num_classes :]) + self.num_classes
        if wrong.size:
            raise UserError(
                f"{what} has the values {first_of(wrong)}, expected "
                f"0..{self.num_classes - 1}{more}; check the label map and the number of classes"
            )


def as_bytes(values: Any, what: str) -> NDArray[np.uint8]:
    """Labels as bytes, never clipped.

    Args:
        values: Integer array or tensor.
        what: Its name, for messages.

    Returns:
        The same values.

    Raises:
        TypeError: If it does not hold integers.
        UserError: If a value does not fit.
    """
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else values
    array = np.asarray(array)
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{what} must hold integers, got {array.dtype}; take the argmax first")
    if array.size and not (0 <= array.min() and array.max() <= IGNORE_INDEX):
        raise UserError(
            f"{what} has values from {array.min()} to {array.max()}, expected classes up to 254 "
            "and 255 for void; map them first"
        )
    return array.astype(np.uint8)


def sum_of_counts(
    counts: NDArray[np.int64], device: torch.device | str = "cpu"
) -> NDArray[np.int64]:
    """Sum over processes, exact because it is one of integers.

    Args:
        counts: Of the same shape in every process.
        device: Where the processes communicate.

    Returns:
        The sums, on every process.
    """
    total = sum_over_processes(torch.from_numpy(np.array(counts, np.int64)).to(device))
    return total.cpu().numpy()


def fraction(part: Any, whole: Any) -> NDArray[np.float64]:
    """Quotient of two arrays.

    Args:
        part: Numbers.
        whole: Numbers of the same shape.

    Returns:
        The quotients; NaN where `whole` is zero.
    """
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def mean_of_known(values: Any) -> float:
    """Mean of the numbers that are not NaN.

    Args:
        values: Numbers.

    Returns:
        Their mean; NaN where there are none.
    """
    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    return float(known.mean()) if known.size else float("nan")
