"""Which predictions of one image are right, for pictures: objects and panoptic segments.

Letters: H, W map; T, D objects of the ground truth and detections; M pairs that overlap.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

IOU = 0.5
VOID = 0


@dataclass(frozen=True)
class Object:
    """An object of the ground truth, or a detection.

    Attributes:
        category: Class 0 ... K - 1.
        box: [4], corners in pixels.
        mask: [H, W] of 0 and 1, or None.
        score: Of a detection, else None.
        crowd: Whether the ground truth did not tell the objects of a group apart.
    """

    category: int
    box: np.ndarray
    mask: np.ndarray | None = None
    score: float | None = None
    crowd: bool = False


@dataclass(frozen=True)
class Comparison:
    """Indices of one image's detections and ground truth.

    Attributes:
        right: Detections that match an object.
        wrong: Detections that match none, and lie on no crowd.
        missed: Objects, no crowds, that no detection matches.
    """

    right: tuple[int, ...]
    wrong: tuple[int, ...]
    missed: tuple[int, ...]


def compare_objects(truth: Sequence[Object], found: Sequence[Object]) -> Comparison:
    """Match as COCO's evaluation does at IoU 0.5, best scores first.

    Every detection takes the free object of its class that it overlaps most; one that overlaps
    none but a crowd of its class is neither right nor wrong. IoUs are those of masks where all
    objects have one, else of boxes.

    Args:
        truth: Objects of the ground truth.
        found: Detections.

    Returns:
        The comparison.
    """
    iou = _ious(truth, found)  # [D, T]
    same = np.array([[f.category == t.category for t in truth] for f in found], bool)
    iou = np.where(same.reshape(iou.shape), iou, 0.0)
    crowd = np.array([t.crowd for t in truth], bool)
    free = ~crowd
    right, wrong = [], []
    for index in sorted(range(len(found)), key=lambda i: -(found[i].score or 0.0)):
        candidates = np.where(free, iou[index], 0.0)
        if candidates.size and candidates.max() >= IOU:
            right.append(index)
            free[candidates.argmax()] = False
        elif not (iou[index][crowd] >= IOU).any():
            wrong.append(index)
    missed = np.flatnonzero(free)
    return Comparison(tuple(sorted(right)), tuple(sorted(wrong)), tuple(missed.tolist()))


def _ious(truth: Sequence[Object], found: Sequence[Object]) -> np.ndarray:
    if not truth or not found:
        return np.zeros((len(found), len(truth)))
    masks = all(item.mask is not None for item in (*truth, *found))
    shapes = [[_rle(o.mask) if masks else _xywh(o.box) for o in side] for side in (found, truth)]
    if not masks:
        shapes = [np.array(side, np.float64) for side in shapes]
    return np.asarray(coco_mask.iou(*shapes, [int(t.crowd) for t in truth]))


def _rle(mask: np.ndarray) -> dict[str, Any]:
    return coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))


def _xywh(box: np.ndarray) -> np.ndarray:
    return np.concatenate([box[:2], box[2:] - box[:2]])


def compare_segments(
    truth_ids: np.ndarray,
    predicted_ids: np.ndarray,
    truth: Sequence[Mapping[str, Any]],
    predicted: Sequence[Mapping[str, Any]],
) -> tuple[dict[int, int], Comparison]:
    """Match segments by the rules of panoptic quality, see `d2ctx.evaluation.panoptic_quality`.

    Args:
        truth_ids: [H, W] segment ids, 0 is void.
        predicted_ids: [H, W], likewise.
        truth: `segments_info` of the ground truth.
        predicted: `segments_info` of the prediction.

    Returns:
        Predicted id -> id of the segment that it matches; and the comparison, with segment ids in
        the place of indices.
    """
    pairs, counts = np.unique(
        np.stack([truth_ids.ravel(), predicted_ids.ravel()]), axis=1, return_counts=True
    )
    overlap = {(int(t), int(p)): int(n) for (t, p), n in zip(pairs.T, counts, strict=True)}
    theirs = {s["id"]: s for s in truth}
    ours = {s["id"]: s for s in predicted}
    area = {p: sum(n for (_, other), n in overlap.items() if other == p) for p in ours}
    matches, forgiven = {}, dict.fromkeys(ours, 0)
    for (t, p), n in overlap.items():
        if p not in ours:
            continue
        same = t in theirs and theirs[t]["category_id"] == ours[p]["category_id"]
        crowd = t in theirs and theirs[t].get("iscrowd", 0) == 1
        union = area[p] - overlap.get((VOID, p), 0) + theirs[t]["area"] - n if same else 1
        if same and not crowd and n / union > IOU:
            matches[p] = t
        if t == VOID or (same and crowd):
            forgiven[p] += n
    wrong = [p for p in ours if p not in matches and forgiven[p] / area[p] <= IOU]
    hit = set(matches.values())
    missed = [t for t, s in theirs.items() if t not in hit and s.get("iscrowd", 0) != 1]
    return matches, Comparison(tuple(matches), tuple(wrong), tuple(missed))
