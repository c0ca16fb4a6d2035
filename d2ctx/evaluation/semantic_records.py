"""What mean IoU needs of every image: the stuff and things that a semantic branch got right.

Panoptic FPN's branch labels every pixel: 0 for things, 1..S for stuff; pixels that are void in the
ground truth do not count.

Letters: N images, K classes, E cells: an image and a class that occurs there; H, W map.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2ctx.evaluation.record_files import (
    Arrays,
    check_array,
    read_record,
    write_record,
)

KIND = "mean IoU"
TASK = "sem_seg"


@dataclass(frozen=True)
class LabelCounts:
    """One image.

    Attributes:
        image: Its id, as text.
        digest: Changes with the ground truth.
        right: int64 [K], pixels that are right.
        union: int64 [K], pixels in ground truth or prediction.
    """

    image: str
    digest: int
    right: NDArray[np.int64]
    union: NDArray[np.int64]


def count_labels(
    image: str,
    truth: NDArray[np.uint8],
    predicted: NDArray[Any],
    *,
    num_classes: int,
    ignored: int,
) -> LabelCounts:
    """Count the pixels of one image.

    Args:
        image: Its id.
        truth: [H, W] labels.
        predicted: [H, W] labels 0..K-1.
        num_classes: K.
        ignored: Label of void.

    Returns:
        The counts.
    """
    known = truth != ignored
    t, p = truth[known].astype(np.int64), predicted[known].astype(np.int64)
    right = np.bincount(t[t == p], minlength=num_classes)
    union = np.bincount(t, minlength=num_classes) + np.bincount(p, minlength=num_classes) - right
    return LabelCounts(image, zlib.crc32(np.ascontiguousarray(truth).tobytes()), right, union)


@dataclass(frozen=True, kw_only=True)
class SemanticRecord:
    """Labels of a data set.

    Attributes:
        about: "kind", "dataset", "task" and "classes".
        images: Ids of the images, as text.
        digests: uint32 [N], change with the ground truth of an image.
        cells: int64 [4, E]: image, class, pixels that are right, pixels in either.
    """

    about: Mapping[str, Any]
    images: tuple[str, ...]
    digests: NDArray[np.uint32]
    cells: NDArray[np.int64]

    def same_as(self, other: "SemanticRecord") -> bool:
        """Whether two records hold the same counts.

        Args:
            other: Of the same images.

        Returns:
            The answer.
        """
        return np.array_equal(self.cells, other.cells)

    def dense(self) -> NDArray[np.float64]:
        """[2, N, K]: pixels that are right, pixels in either."""
        table = np.zeros((2, len(self.images), len(self.about["classes"])))
        image, k = self.cells[:2]
        table[:, image, k] = self.cells[2:]
        return table

    def write(self, folder: Path) -> None:
        """Write `per_image_sem_seg.npz`.

        Args:
            folder: Exists.
        """
        arrays = {"cells": self.cells}
        write_record(folder, self.about, images=self.images, digests=self.digests, arrays=arrays)


def record_labels(
    counts: Sequence[LabelCounts], *, classes: Sequence[str], dataset: str
) -> SemanticRecord:
    """Keep the counts of every image.

    Args:
        counts: At least one; each image once.
        classes: Names of the classes.
        dataset: Name of the data set.

    Returns:
        The record, images in the order of their ids.
    """
    ordered = sorted(counts, key=lambda one: one.image)
    both = np.stack([[one.right, one.union] for one in ordered])  # [N, 2, K]
    image, k = np.nonzero(both[:, 1])
    return SemanticRecord(
        about={"kind": KIND, "dataset": dataset, "task": TASK, "classes": list(classes)},
        images=tuple(one.image for one in ordered),
        digests=np.array([one.digest for one in ordered], np.uint32),
        cells=np.stack([image, k, both[image, 0, k], both[image, 1, k]]).astype(np.int64),
    )


def read_labels(path: Path) -> SemanticRecord:
    """Read a file of `SemanticRecord.write`; everything is checked.

    Args:
        path: The file.

    Returns:
        The record.

    Raises:
        UserError: If it is missing, damaged or something else.
    """
    return SemanticRecord(**read_record(path, kind=KIND, names=("cells",), check=_check))


def _check(about: Mapping[str, Any], arrays: Arrays) -> None:
    limits = len(arrays["images"]), len(about["classes"])
    check_array(arrays, "cells", np.int64, rows=4, limits=limits)
