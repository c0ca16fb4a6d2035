"""Which detections COCO's evaluation counts as right or wrong, image by image.

The rules are those of pycocotools' `evaluateImg`, all thresholds and sizes at once: detections by
falling score, each takes the free object with the largest IoU, the later one of two equal ones;
real objects before ignored ones; crowds can be taken again and again.

Letters: D detections and G objects of one class in one image, T thresholds, A areas, N images,
K classes.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

THRESHOLDS = np.linspace(0.5, 0.95, 10)
AREAS = {
    "all": (0.0, 1e10),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}
MAX_DETECTIONS = 100
_BOUNDS = np.array(list(AREAS.values()))
# As in pycocotools: an IoU of one is reached by rounding, too.
_LEAST = np.minimum(THRESHOLDS, 1 - 1e-10)


def match(
    iou: NDArray[np.float64],
    *,
    found_areas: NDArray[np.float64],
    areas: NDArray[np.float64],
    crowd: NDArray[np.bool_],
    has_id: NDArray[np.bool_],
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Match the detections of one class in one image.

    Args:
        iou: [D, G], detections by falling score; of a crowd, the share of the detection on it.
        found_areas: [D] of the detections.
        areas: [G] of the objects.
        crowd: [G].
        has_id: [G] whether its id is not 0: that of nobody in these rules, so an object with it
            can be taken, but nothing was found.

    Returns:
        [D, T, A] whether a detection is right, and whether it counts at all.
    """
    outside = (areas < _BOUNDS[:, :1]) | (areas > _BOUNDS[:, 1:])  # [A, G]
    ignored = crowd | outside
    shape = len(iou), len(THRESHOLDS), len(AREAS)
    unmatched_counts = (found_areas[:, None] >= _BOUNDS[:, 0]) & (
        found_areas[:, None] <= _BOUNDS[:, 1]
    )
    right = np.zeros(shape, bool)
    counts = np.broadcast_to(unmatched_counts[:, None], shape).copy()
    free = np.ones((shape[1], shape[2], len(areas)), bool)
    for d in np.flatnonzero(iou.max(axis=1, initial=0) >= _LEAST[0]):
        reached = (free | crowd) & (iou[d] >= _LEAST[:, None])[:, None]  # [T, A, G]
        real = reached & ~ignored
        candidates = np.where(real.any(axis=2, keepdims=True), real, reached)
        # The last of the largest.
        best = len(areas) - 1 - np.where(candidates, iou[d], -1.0)[..., ::-1].argmax(axis=2)
        t, a = np.nonzero(candidates.any(axis=2))
        taken = best[t, a]
        free[t, a, taken] = False
        right[d, t, a] = ~ignored[a, taken] & has_id[taken]
        counts[d, t, a] = ~ignored[a, taken] & (has_id[taken] | unmatched_counts[d, a])
    return right, counts


def match_images(
    truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]], *, task: str
) -> Iterator[tuple[int, int, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_]]]:
    """Match all detections of a data set.

    Args:
        truth: Content of a json in COCO's instance format, with annotations.
        detections: Results in COCO's format.
        task: "bbox" or "segm".

    Yields:
        Of every image and class with detections: the image's number, the class's number, scores
        [D], and what `match` returns.
    """
    images = {image["id"]: image for image in ordered_images(truth)}
    objects = _grouped(truth["annotations"])
    found = _grouped(detections)
    classes = [category["id"] for category in ordered_categories(truth)]
    for number, (image_id, image) in enumerate(images.items()):
        for k, category in enumerate(classes):
            some = found.get((image_id, category))
            if some:
                known = objects.get((image_id, category), [])
                yield number, k, *_match_some(some, known, image, task)


def _match_some(
    some: list[Mapping[str, Any]], known: list[Mapping[str, Any]], image: Mapping, task: str
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_]]:
    scores = np.array([detection["score"] for detection in some], np.float64)
    order = np.argsort(-scores, kind="stable")[:MAX_DETECTIONS]
    some = [some[i] for i in order]
    crowd = np.array([bool(o.get("iscrowd")) for o in known], bool)
    iou, found_areas = _overlaps(some, known, crowd, image, task)
    areas = np.array([o["area"] for o in known], np.float64)
    has_id = np.array([o["id"] != 0 for o in known], bool)
    matched = match(iou, found_areas=found_areas, areas=areas, crowd=crowd, has_id=has_id)
    return scores[order], *matched


def _overlaps(
    some: list[Mapping], known: list[Mapping], crowd: NDArray[np.bool_], image: Mapping, task: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """IoU [D, G] and areas of the detections [D]."""
    if task == "bbox":
        found = np.array([detection["bbox"] for detection in some], np.float64)
        areas = found[:, 2] * found[:, 3]
        real = np.array([o["bbox"] for o in known], np.float64)
    else:
        found = [_bytes(detection["segmentation"]) for detection in some]
        areas = coco_mask.area(found).astype(np.float64)
        real = [_run_lengths(o["segmentation"], image) for o in known]
    if not known:
        return np.zeros((len(some), 0)), areas
    return np.asarray(coco_mask.iou(found, real, crowd.astype(np.uint8).tolist())), areas


def _run_lengths(segmentation: Any, image: Mapping[str, Any]) -> dict[str, Any]:
    size = image["height"], image["width"]
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, *size)
    return _bytes(segmentation)


def _bytes(mask: Mapping[str, Any]) -> dict[str, Any]:
    counts = mask["counts"]
    return {**mask, "counts": counts.encode() if isinstance(counts, str) else counts}


def _grouped(entries: Sequence[Mapping[str, Any]]) -> dict[tuple, list[Mapping[str, Any]]]:
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for entry in entries:
        groups.setdefault((entry["image_id"], entry["category_id"]), []).append(entry)
    return groups


def ordered_images(truth: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The images as COCO's evaluation goes through them: by id, names as text.

    Args:
        truth: Content of a json.

    Returns:
        Its images.
    """
    images = truth["images"]
    numbers = all(isinstance(image["id"], int) for image in images)
    return sorted(images, key=lambda image: image["id"] if numbers else str(image["id"]))


def ordered_categories(truth: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The categories by id.

    Args:
        truth: Content of a json.

    Returns:
        Its categories.
    """
    return sorted(truth["categories"], key=lambda category: category["id"])
