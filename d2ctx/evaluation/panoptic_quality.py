"""Panoptic quality (Kirillov et al., "Panoptic Segmentation", Eq. 1) with the official rules.

    PQ = sum of IoU over TP / (TP + FP/2 + FN/2),   SQ = mean IoU over TP,   RQ = PQ / SQ

The rules for void, crowds and areas are those of panopticapi and cityscapesScripts, whose numbers
these are. One `np.unique` over pairs of ids per image does the work.

Letters: H, W map; T, P segments of the ground truth and of the prediction; M pairs that overlap.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from d2ctx.errors import UserError
from d2ctx.wording import first_of

VOID = 0
_ID_BITS = 24  # an id is three bytes of a PNG


@dataclass
class CategoryCounts:
    """What was found of one category.

    Attributes:
        ious: IoU of each true positive.
        fp: False positives.
        fn: False negatives.
    """

    ious: list[float] = field(default_factory=list)
    fp: int = 0
    fn: int = 0

    @property
    def tp(self) -> int:
        """True positives."""
        return len(self.ious)

    @property
    def iou_sum(self) -> float:
        """Sum of the IoUs, rounded once: the order of the images does not matter."""
        return math.fsum(self.ious)

    @property
    def seen(self) -> bool:
        """Whether the category occurs in the ground truth or in the predictions."""
        return bool(self.tp or self.fp or self.fn)

    def quality(self) -> dict[str, float]:
        """PQ, SQ and RQ as fractions; NaN where the category was not seen."""
        if not self.seen:
            return dict.fromkeys(("pq", "sq", "rq"), math.nan)
        recognised = self.tp + 0.5 * self.fp + 0.5 * self.fn
        return {
            "pq": self.iou_sum / recognised,
            "sq": self.iou_sum / self.tp if self.tp else 0.0,
            "rq": self.tp / recognised,
        }


def add_counts(parts: Iterable[Mapping[int, CategoryCounts]]) -> dict[int, CategoryCounts]:
    """Counts of several images together.

    Args:
        parts: Category id -> counts, of each image.

    Returns:
        Category id -> counts of all images.
    """
    total: dict[int, CategoryCounts] = {}
    for part in parts:
        for category, counts in part.items():
            mine = total.setdefault(category, CategoryCounts())
            mine.ious += counts.ious
            mine.fp += counts.fp
            mine.fn += counts.fn
    return total


def summarize(
    counts: Mapping[int, CategoryCounts], categories: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Averages over the categories that were seen, as the official code reports them.

    Deviation: where no category of a kind was seen, the official code divides by zero; here the
    values are NaN. A category that was not seen is NaN, not 0.

    Args:
        counts: Category id -> counts.
        categories: The list "categories" of a panoptic json.

    Returns:
        "All", "Things", "Stuff" -> pq, sq, rq (fractions) and n, the number of categories;
        "per_class" -> category id -> pq, sq, rq, tp, fp, fn, iou_sum.
    """
    kinds: dict[str, list[dict[str, float]]] = {"All": [], "Things": [], "Stuff": []}
    per_class = {}
    for category in categories:
        mine = counts.get(category["id"], CategoryCounts())
        quality = mine.quality()
        found = {"tp": mine.tp, "fp": mine.fp, "fn": mine.fn, "iou_sum": mine.iou_sum}
        per_class[category["id"]] = {**quality, **found}
        if mine.seen:
            kinds["All"].append(quality)
            kinds["Things" if category["isthing"] else "Stuff"].append(quality)
    return {kind: _mean(listed) for kind, listed in kinds.items()} | {"per_class": per_class}


def _mean(qualities: list[dict[str, float]]) -> dict[str, float]:
    count = len(qualities)
    keys = ("pq", "sq", "rq")
    means = {k: sum(q[k] for q in qualities) / count if count else math.nan for k in keys}
    return means | {"n": count}


@dataclass(frozen=True)
class _Table:
    """Segments of one side, ordered by id.

    Attributes:
        ids: [S] segment ids.
        categories: [S] category ids.
        crowd: [S] whether a crowd.
        areas: [S] areas in pixels, of the json.
        order: [S] place in the json's list.
    """

    ids: np.ndarray
    categories: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    order: np.ndarray

    @classmethod
    def of(cls, segments: Sequence[Mapping[str, Any]]) -> "_Table":
        def column(key: str) -> np.ndarray:
            return np.array([s.get(key, 0) for s in segments], np.int64)

        ids = column("id")
        order = np.argsort(ids, kind="stable")
        columns = (ids, column("category_id"), column("iscrowd") == 1, column("area"))
        return cls(*(c[order] for c in columns), order)

    def find(self, ids: np.ndarray) -> np.ndarray:
        """[M] row of each id; -1 where it is not listed."""
        if not len(self.ids):
            return np.full(len(ids), -1)
        row = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return np.where(self.ids[row] == ids, row, -1)


def count_image(
    *,
    truth_ids: np.ndarray,
    predicted_ids: np.ndarray,
    truth: Sequence[Mapping[str, Any]],
    predicted: Sequence[Mapping[str, Any]],
    categories: Iterable[int],
    name: str = "image",
) -> dict[int, CategoryCounts]:
    """Match the segments of one image.

    A pair matches where the categories are equal, the ground truth is no crowd and
    IoU > 0.5, with union = area + area - intersection - (prediction on void). Areas of the
    ground truth are those of its json. An unmatched prediction is forgiven where more than half of
    it lies on void or on the category's crowd segment, of which only the last listed counts.

    Args:
        truth_ids: [H, W] segment ids; 0 is void.
        predicted_ids: [H, W] segment ids; 0 is void.
        truth: `segments_info` of the ground truth: id, category_id, area, iscrowd.
        predicted: `segments_info` of the prediction: id, category_id.
        categories: Ids of the known categories.
        name: What messages call the image.

    Returns:
        Category id -> counts, for the categories that occur.

    Raises:
        UserError: If the sizes differ, or where a json and its PNG disagree.
    """
    if truth_ids.shape != predicted_ids.shape:
        raise UserError(
            f"{name}: the prediction is {_size(predicted_ids)}, the ground truth "
            f"{_size(truth_ids)}; write predictions at the image's own size"
        )
    pairs = (truth_ids.astype(np.int64) << _ID_BITS) | predicted_ids
    pairs, overlap = np.unique(pairs, return_counts=True)  # [M]
    sides = (pairs >> _ID_BITS, pairs & ((1 << _ID_BITS) - 1))
    known = frozenset(categories)
    check_segments(sides[0], truth, categories=known, name=f"{name}, ground truth")
    check_segments(sides[1], predicted, categories=known, name=f"{name}, prediction")
    return _match(_Table.of(truth), _Table.of(predicted), *sides, overlap)


def _match(
    truth: _Table, predicted: _Table, truth_id: np.ndarray, predicted_id: np.ndarray, n: np.ndarray
) -> dict[int, CategoryCounts]:
    t, p = truth.find(truth_id), predicted.find(predicted_id)  # [M], -1 is void

    def pixels(select: np.ndarray) -> np.ndarray:  # [P] selected pixels of each prediction
        select = select & (p >= 0)
        return np.bincount(p[select], n[select], len(predicted.ids)).astype(np.int64)

    area, on_void = pixels(p >= 0), pixels(truth_id == VOID)
    both = np.flatnonzero((t >= 0) & (p >= 0))
    tm, pm, nm = t[both], p[both], n[both]
    same = (truth.categories[tm] == predicted.categories[pm]) & ~truth.crowd[tm]
    tm, pm, nm = tm[same], pm[same], nm[same]
    iou = nm / (area[pm] + truth.areas[tm] - nm - on_void[pm])
    hit = iou > 0.5
    counts: dict[int, CategoryCounts] = {}

    def of(category: np.int64) -> CategoryCounts:
        return counts.setdefault(int(category), CategoryCounts())

    for category, value in zip(truth.categories[tm[hit]], iou[hit], strict=True):
        of(category).ious.append(float(value))
    missed = ~truth.crowd
    missed[tm[hit]] = False
    for category in truth.categories[missed]:
        of(category).fn += 1
    forgiven = pixels((truth_id == VOID) | _on_its_crowd(truth, predicted, t, p)) / area > 0.5
    wrong = ~forgiven
    wrong[pm[hit]] = False
    for category in predicted.categories[wrong]:
        of(category).fp += 1
    return counts


def _on_its_crowd(truth: _Table, predicted: _Table, t: np.ndarray, p: np.ndarray) -> np.ndarray:
    """[M] whether a pair is a prediction on the crowd segment of its category."""
    crowds = np.flatnonzero(truth.crowd)
    crowds = crowds[np.argsort(truth.order[crowds])]
    last = dict(zip(truth.categories[crowds].tolist(), crowds.tolist(), strict=True))
    wanted = np.array([last.get(c, -2) for c in predicted.categories.tolist()], np.int64)  # [P]
    if not len(wanted):
        return np.zeros(len(p), bool)
    return (p >= 0) & (wanted[p] == t)


def check_segments(
    ids: np.ndarray, segments: Sequence[Mapping[str, Any]], *, categories: frozenset, name: str
) -> None:
    """Check that a PNG and its `segments_info` hold the same segments.

    Args:
        ids: Every id that occurs in the PNG; repeats are harmless.
        segments: The json's list for it.
        categories: Ids of the known categories.
        name: What messages call the image and the side.

    Raises:
        UserError: Naming the ids.
    """
    if problem := disagreement(ids, segments, categories=categories):
        raise UserError(f"{name}: {problem}; write the json and the PNG from the same segments")


def disagreement(
    ids: np.ndarray, segments: Sequence[Mapping[str, Any]], *, categories: frozenset
) -> str:
    """In what a PNG and its `segments_info` disagree; "" where they agree.

    Args:
        ids: Every id that occurs in the PNG; repeats are harmless.
        segments: The json's list for it.
        categories: Ids of the known categories.

    Returns:
        A phrase that names the ids.
    """
    listed = [segment["id"] for segment in segments]
    shown = set(ids.tolist()) - {VOID}
    if len(set(listed)) < len(listed):
        twice = sorted({i for i in listed if listed.count(i) > 1})
        return f"the json lists segment {first_of(twice)} more than once"
    if VOID in listed:
        return f"the json lists segment {VOID}, which is void"
    if extra := sorted(shown - set(listed)):
        return f"the PNG holds segment {first_of(extra)}, which the json does not list"
    if absent := sorted(set(listed) - shown):
        return f"the json lists segment {first_of(absent)}, which the PNG does not hold"
    unknown = [s for s in segments if s["category_id"] not in categories]
    if unknown:
        return f"segment {unknown[0]['id']} has the unknown category {unknown[0]['category_id']}"
    return ""


def _size(ids: np.ndarray) -> str:
    return f"{ids.shape[1]}x{ids.shape[0]}"
