"""What average precision needs of every image: scores of detections, and which are right.

Average precision is no mean over images: precision is a curve over all detections by score. With
these records it can be computed for any choice of images, exactly as COCO's evaluation does.

Letters: N images, K classes, D detections and G objects of the whole data set, T thresholds,
A areas.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2ctx.evaluation.ap_matching import (
    AREAS,
    THRESHOLDS,
    match_images,
    ordered_categories,
    ordered_images,
)
from d2ctx.evaluation.coco_scores import class_names
from d2ctx.evaluation.record_files import (
    Arrays,
    check_array,
    digest,
    read_record,
    write_record,
)

KIND = "average precision"
_CELLS = len(THRESHOLDS) * len(AREAS)
_PACKED = -(-_CELLS // 8)  # bytes of T x A bits
_TRUTH_KEYS = ("category_id", "bbox", "area", "iscrowd", "segmentation")


@dataclass(frozen=True, kw_only=True)
class ApRecord:
    """Detections and objects of a data set, one task.

    Attributes:
        about: "kind", "dataset", "task" and "classes".
        images: Ids of the images, in the order of COCO's evaluation.
        digests: uint32 [N], change with the ground truth of an image.
        found: int32 [2, D]: image and class of every detection; by image, class, falling score.
        scores: float64 [D].
        right: bool [D, T, A].
        counts: bool [D, T, A]; what does not count is ignored, as detections of crowds are.
        objects: int32 [2, G]: image and class of every object that is no crowd.
        areas: float64 [G].
    """

    about: Mapping[str, Any]
    images: tuple[str, ...]
    digests: NDArray[np.uint32]
    found: NDArray[np.int32]
    scores: NDArray[np.float64]
    right: NDArray[np.bool_]
    counts: NDArray[np.bool_]
    objects: NDArray[np.int32]
    areas: NDArray[np.float64]

    def same_as(self, other: "ApRecord") -> bool:
        """Whether two records hold the same detections.

        Args:
            other: Of the same images.

        Returns:
            The answer.
        """
        return all(
            np.array_equal(getattr(self, name), getattr(other, name))
            for name in ("found", "scores", "right", "counts")
        )

    def write(self, folder: Path) -> None:
        """Write `per_image_<task>.npz`.

        Args:
            folder: Exists.
        """
        rows = len(self.scores)
        arrays = {
            "found": self.found,
            "scores": self.scores,
            "right": np.packbits(self.right.reshape(rows, _CELLS), axis=1),
            "counts": np.packbits(self.counts.reshape(rows, _CELLS), axis=1),
            "objects": self.objects,
            "areas": self.areas,
        }
        write_record(folder, self.about, images=self.images, digests=self.digests, arrays=arrays)


def record_detections(
    truth: Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    *,
    task: str,
    dataset: str,
) -> ApRecord:
    """Match detections and keep what came of each.

    Args:
        truth: Content of a json in COCO's instance format, with annotations.
        detections: Results in COCO's format.
        task: "bbox" or "segm".
        dataset: Name of the data set.

    Returns:
        The record.
    """
    parts = list(match_images(truth, detections, task=task))
    lengths = [len(scores) for _, _, scores, _, _ in parts]
    place = [[image for image, *_ in parts], [k for _, k, *_ in parts]]
    none = np.zeros((0, len(THRESHOLDS), len(AREAS)), bool)
    images = ordered_images(truth)
    number = {image["id"]: n for n, image in enumerate(images)}
    return ApRecord(
        about={
            "kind": KIND,
            "dataset": dataset,
            "task": task,
            "classes": class_names(truth["categories"]),
        },
        images=tuple(str(image["id"]) for image in images),
        digests=_digests(truth, number),
        found=np.repeat(np.array(place, np.int32).reshape(2, -1), lengths, axis=1),
        scores=np.concatenate([np.zeros(0), *(part[2] for part in parts)]),
        right=np.concatenate([none, *(part[3] for part in parts)]),
        counts=np.concatenate([none, *(part[4] for part in parts)]),
        **_objects(truth, number),
    )


def _digests(truth: Mapping[str, Any], number: Mapping[Any, int]) -> NDArray[np.uint32]:
    of_image: list[list[Any]] = [[] for _ in number]
    for entry in truth["annotations"]:
        if entry["image_id"] in number:
            of_image[number[entry["image_id"]]].append([entry.get(key) for key in _TRUTH_KEYS])
    return np.array([digest(entries) for entries in of_image], np.uint32)


def _objects(truth: Mapping[str, Any], number: Mapping[Any, int]) -> dict[str, NDArray[Any]]:
    known = {category["id"]: k for k, category in enumerate(ordered_categories(truth))}
    rows = [
        (number[entry["image_id"]], known[entry["category_id"]], entry["area"])
        for entry in truth["annotations"]
        if not entry.get("iscrowd")
        and entry["image_id"] in number
        and entry["category_id"] in known
    ]
    table = np.array(rows, np.float64).reshape(-1, 3)
    return {"objects": table[:, :2].T.astype(np.int32), "areas": table[:, 2]}


def read_detections(path: Path) -> ApRecord:
    """Read a file of `ApRecord.write`; everything is checked.

    Args:
        path: The file.

    Returns:
        The record.

    Raises:
        UserError: If it is missing, damaged or something else.
    """
    names = ("found", "scores", "right", "counts", "objects", "areas")
    stored = read_record(path, kind=KIND, names=names, check=_check)
    bits = {
        name: np.unpackbits(stored[name], axis=1, count=_CELLS)
        .astype(bool)
        .reshape(-1, len(THRESHOLDS), len(AREAS))
        for name in ("right", "counts")
    }
    return ApRecord(**{**stored, **bits})


def _check(about: Mapping[str, Any], arrays: Arrays) -> None:
    limits = len(arrays["images"]), len(about["classes"])
    for name, values in (("found", "scores"), ("objects", "areas")):
        check_array(arrays, name, np.int32, rows=2, limits=limits)
        check_array(arrays, values, np.float64, rows=None)
        if arrays[values].shape[0] != arrays[name].shape[1]:
            raise ValueError(f"{name!r} and {values!r} are of different length")
    for name in ("right", "counts"):
        if arrays[name].dtype != np.uint8 or arrays[name].shape != (len(arrays["scores"]), _PACKED):
            raise ValueError(f"{name!r} is {arrays[name].dtype} {list(arrays[name].shape)}")
