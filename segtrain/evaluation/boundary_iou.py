"""Boundary IoU (Cheng et al., CVPR 2021, Eq. 1), summed over a split, class by class.

The band of a class holds its pixels at most d away (chessboard distance) from a pixel of something
else or from the outside of the image; d is 2 % of the diagonal of the image. Void pixels of the
ground truth are void on both sides, so that a perfect prediction has 1.

For all classes at once: a pixel lies in the band of its class where the square of 2d + 1 pixels
around it holds two values, where its minimum differs from its maximum.

Letters: K classes, H W map, d width of the band.
"""

from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from segtrain.data.labels import IGNORE_INDEX
from segtrain.evaluation.confusion import fraction, sum_of_counts

RATIO = 0.02
DEFINITION = (
    "intersection over union of the bands of ground truth and prediction; a band holds the pixels "
    "of a class at most d (chessboard distance) from another value or the outside of the image, "
    f"d = {RATIO} of the image diagonal, at least 1; void pixels of the ground truth are void on "
    "both sides; counts are summed over the split"
)


@dataclass
class BoundaryCounts:
    """Pixels of the bands of each class; exact over images and processes.

    Args:
        num_classes: K.
        ratio: d as a share of the diagonal.
    """

    num_classes: int
    ratio: float = RATIO
    counts: NDArray[np.int64] = field(init=False)  # [3, K]: both bands, ground truth, prediction

    def __post_init__(self) -> None:
        self.counts = np.zeros((3, self.num_classes), np.int64)

    def update(self, prediction: NDArray[np.uint8], label: NDArray[np.uint8]) -> None:
        """Count one image.

        Args:
            prediction: uint8 [H, W]: 0..K-1.
            label: uint8 [H, W]: 0..K-1, or 255.
        """
        predicted = np.where(label == IGNORE_INDEX, label, prediction)
        width = max(1, round(self.ratio * float(np.hypot(*label.shape))))
        truth_band, predicted_band = band(label, width), band(predicted, width)
        both = truth_band & predicted_band & (label == predicted)
        for row, labels in enumerate((label[both], label[truth_band], predicted[predicted_band])):
            found = np.bincount(labels, minlength=IGNORE_INDEX + 1)
            self.counts[row] += found[: self.num_classes]

    def all_reduce(self, device: torch.device | str = "cpu") -> None:
        """Replace the counts by their sum over all processes.

        Args:
            device: Where the processes communicate.
        """
        self.counts = sum_of_counts(self.counts, device)

    def iou(self) -> NDArray[np.float64]:
        """Boundary IoU of each class.

        Returns:
            [K] from 0 to 1; NaN for classes that occur nowhere.
        """
        both, truth, predicted = self.counts
        return fraction(both, truth + predicted - both)


def band(labels: NDArray[np.uint8], width: int) -> NDArray[np.bool_]:
    """Pixels near the border of their class.

    Args:
        labels: uint8 [H, W].
        width: d in pixels, at least 1.

    Returns:
        [H, W].
    """
    square = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    lowest = cv2.erode(labels, square, borderType=cv2.BORDER_REPLICATE)
    highest = cv2.dilate(labels, square, borderType=cv2.BORDER_REPLICATE)
    near = lowest != highest
    near[:width] = near[-width:] = True
    near[:, :width] = near[:, -width:] = True
    return near
