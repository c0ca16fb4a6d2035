"""mIoU of small, medium and large classes: three equal groups of classes, ranked by their size.

Segmenter's Table 4 has such columns and does not say how classes are ranked; the definition here is
ours, and every result says it.

Letters: K classes, H W label map.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from segtrain.data.labels import IGNORE_INDEX
from segtrain.evaluation.confusion import fraction, mean_of_known, sum_of_counts

GROUPS = ("small", "medium", "large")
STATISTICS = {
    "component": "mean area in pixels of the 8-connected components of a class",
    "image": "mean area in pixels of a class in the images that show it",
}
DEFINITION = (
    "{statistic}, over the ground truth of the split at its original size; classes sorted by it, "
    "ties by class number, classes without pixels left out; three consecutive groups, as equal as "
    "possible, larger ones first; a group's value is the mean IoU of its classes"
)


@dataclass
class ClassSizes:
    """Areas, components and images of each class; exact over images and processes.

    Args:
        num_classes: K.
    """

    num_classes: int
    area: NDArray[np.int64] = field(init=False)
    components: NDArray[np.int64] = field(init=False)
    images: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.area, self.components, self.images = np.zeros((3, self.num_classes), np.int64)

    def update(self, label: NDArray[np.uint8]) -> None:
        """Measure one ground truth.

        Args:
            label: uint8 [H, W]: 0..K-1, or 255.
        """
        area = np.bincount(label.ravel(), minlength=IGNORE_INDEX + 1)[: self.num_classes]
        self.area += area
        self.images += area > 0
        for k in np.flatnonzero(area):
            mask = cv2.compare(label, int(k), cv2.CMP_EQ)
            x, y, width, height = cv2.boundingRect(mask)
            found, _ = cv2.connectedComponents(mask[y : y + height, x : x + width], connectivity=8)
            self.components[k] += found - 1  # without the background

    def all_reduce(self, device: torch.device | str = "cpu") -> None:
        """Replace the counts by their sum over all processes.

        Args:
            device: Where the processes communicate.
        """
        counts = np.stack([self.area, self.components, self.images])
        self.area, self.components, self.images = sum_of_counts(counts, device)

    def statistic(self, kind: str) -> NDArray[np.float64]:
        """What classes are ranked by.

        Args:
            kind: A key of `STATISTICS`.

        Returns:
            [K]; NaN for classes without pixels.
        """
        return fraction(self.area, self.components if kind == "component" else self.images)


@dataclass(frozen=True)
class SizeGroup:
    """Classes of similar size.

    Attributes:
        name: "small", "medium" or "large".
        classes: Their numbers, smallest first.
        miou: Mean IoU of those that have one, from 0 to 1; NaN where none has.
    """

    name: str
    classes: tuple[int, ...]
    miou: float


def size_groups(statistic: Sequence[float], iou: Sequence[float]) -> tuple[SizeGroup, ...]:
    """Rank the classes and average their IoU in three groups.

    Args:
        statistic: [K], NaN for classes without pixels.
        iou: [K], NaN for classes without a value.

    Returns:
        Small, medium and large.
    """
    values = np.asarray(statistic, np.float64)
    ranked = np.argsort(values, kind="stable")[: np.count_nonzero(~np.isnan(values))]
    return tuple(
        SizeGroup(name, tuple(map(int, part)), mean_of_known(np.asarray(iou)[part]))
        for name, part in zip(GROUPS, np.array_split(ranked, len(GROUPS)), strict=True)
    )
