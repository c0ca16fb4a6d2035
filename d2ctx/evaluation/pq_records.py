"""What panoptic quality needs of every image: its counts and sums of IoU, class by class.

Letters: N images, K classes, E cells: an image and a class that occurs there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2ctx.evaluation.ap_matching import ordered_categories
from d2ctx.evaluation.coco_scores import class_names
from d2ctx.evaluation.panoptic_quality import CategoryCounts
from d2ctx.evaluation.record_files import (
    Arrays,
    check_array,
    digest,
    read_record,
    write_record,
)

KIND = "panoptic quality"
COUNTS = ("tp", "fp", "fn")


@dataclass(frozen=True, kw_only=True)
class PqRecord:
    """Segments of a data set.

    Attributes:
        about: "kind", "dataset", "task", "classes" and "things", a flag for each class.
        images: Ids of the images, as text.
        digests: uint32 [N], change with the ground truth of an image.
        cells: int64 [5, E]: image, class, true positives, false positives, false negatives.
        iou: float64 [E]: sum over the true positives.
    """

    about: Mapping[str, Any]
    images: tuple[str, ...]
    digests: NDArray[np.uint32]
    cells: NDArray[np.int64]
    iou: NDArray[np.float64]

    def same_as(self, other: "PqRecord") -> bool:
        """Whether two records hold the same counts.

        Args:
            other: Of the same images.

        Returns:
            The answer.
        """
        return np.array_equal(self.cells, other.cells) and np.array_equal(self.iou, other.iou)

    def dense(self) -> NDArray[np.float64]:
        """[4, N, K]: true positives, false positives, false negatives, sum of IoU."""
        table = np.zeros((4, len(self.images), len(self.about["classes"])))
        image, k = self.cells[:2]
        table[:, image, k] = [*self.cells[2:], self.iou]
        return table

    def write(self, folder: Path) -> None:
        """Write `per_image_<task>.npz`.

        Args:
            folder: Exists.
        """
        arrays = {"cells": self.cells, "iou": self.iou}
        write_record(folder, self.about, images=self.images, digests=self.digests, arrays=arrays)


def record_segments(
    truth: Mapping[str, Any],
    counts: Sequence[Mapping[int, CategoryCounts]],
    *,
    task: str,
    dataset: str,
) -> PqRecord:
    """Keep the counts of every image.

    Args:
        truth: Content of a panoptic json, with annotations.
        counts: Category id -> counts, of each annotation of it.
        task: Name of the task.
        dataset: Name of the data set.

    Returns:
        The record.
    """
    categories = ordered_categories(truth)
    number = {category["id"]: k for k, category in enumerate(categories)}
    rows = [
        (n, number[category], found.tp, found.fp, found.fn)
        for n, of_image in enumerate(counts)
        for category, found in sorted(of_image.items())
    ]
    sums = [found.iou_sum for of_image in counts for _, found in sorted(of_image.items())]
    return PqRecord(
        about={
            "kind": KIND,
            "dataset": dataset,
            "task": task,
            "classes": class_names(categories),
            "things": [bool(category["isthing"]) for category in categories],
        },
        images=tuple(str(annotation["image_id"]) for annotation in truth["annotations"]),
        digests=np.array([digest(a["segments_info"]) for a in truth["annotations"]], np.uint32),
        cells=np.array(rows, np.int64).reshape(-1, 5).T.copy(),
        iou=np.array(sums, np.float64),
    )


def read_segments(path: Path) -> PqRecord:
    """Read a file of `PqRecord.write`; everything is checked.

    Args:
        path: The file.

    Returns:
        The record.

    Raises:
        UserError: If it is missing, damaged or something else.
    """
    return PqRecord(**read_record(path, kind=KIND, names=("cells", "iou"), check=_check))


def _check(about: Mapping[str, Any], arrays: Arrays) -> None:
    things = about.get("things")
    if not isinstance(things, list) or len(things) != len(about["classes"]):
        raise ValueError("'about' has no things")
    limits = len(arrays["images"]), len(about["classes"])
    check_array(arrays, "cells", np.int64, rows=5, limits=limits)
    check_array(arrays, "iou", np.float64, rows=None)
    if arrays["iou"].shape[0] != arrays["cells"].shape[1]:
        raise ValueError("'cells' and 'iou' are of different length")
