"""COCO's average precision of many resampled sets of images at once.

An image that is drawn w times counts w times, its detections side by side in the order by score.
Precision and recall change at right detections only, so a sample needs their weighted running sums
and nothing else: what lies between two right detections is summed by one embedding bag.

    recall_j = sum_{i <= j} w_i / sum over objects of w,
    precision_j = sum_{i <= j} w_i / (sum of w over all that count, up to j),
    AP = mean over r = 0, 0.01, ..., 1 of max {precision_j : recall_j >= r}

Letters: S samples, N images, K classes, T thresholds, A areas, D detections, J right ones of them.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from d2ctx.evaluation.ap_matching import AREAS, THRESHOLDS
from d2ctx.evaluation.ap_records import ApRecord

_RECALLS = torch.from_numpy(np.linspace(0.0, 1.0, 101))
_TINY = np.spacing(1)  # pycocotools' guard against 0 / 0
_BOUNDS = list(AREAS.values())
_T50, _T75 = 0, 5
HEADLINE = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large")
_MOST = 1 << 20  # numbers of the largest array at a time


@dataclass(frozen=True)
class _Curve:
    """The right detections of one class, area and threshold.

    Attributes:
        events: [J] their places among the events of class and area.
        images: [J] their images.
        out: [E] places of events that do not count at this threshold.
        out_images: [E] their images.
        out_before: [J] how many of those lie before.
    """

    events: Tensor
    images: Tensor
    out: Tensor
    out_images: Tensor
    out_before: Tensor


@dataclass(frozen=True)
class _Ranked:
    """Detections of one class and area by falling score.

    Attributes:
        images: [D] of those that count at some threshold.
        starts: [P] of the bags: each ends with an event, a detection that is right at some
            threshold or does not count at some.
        curves: One for each threshold.
    """

    images: Tensor
    starts: Tensor
    curves: list[_Curve]


class ApScorer:
    """Scores of one run.

    Args:
        record: Of its detections.
    """

    def __init__(self, record: ApRecord) -> None:
        self.num_classes = len(record.about["classes"])
        self.names = (*HEADLINE, *record.about["classes"])
        self._objects = _object_counts(record, self.num_classes)
        by_class = np.lexsort((-record.scores, record.found[1]))  # stable: then by image
        ends = np.searchsorted(record.found[1][by_class], np.arange(self.num_classes + 1))
        self._ranked = [
            [_ranked(record, by_class[ends[k] : ends[k + 1]], a) for a in range(len(AREAS))]
            for k in range(self.num_classes)
        ]

    def scores(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Score samples.

        Args:
            weights: [S, N] how often each image was drawn.

        Returns:
            [S, 6 + K], from 0 to 1: AP, AP50, AP75, AP of small, medium and large objects, AP of
            each class; NaN where there is no object.
        """
        # Whole numbers, and their sums, are exact in float32 below 2^24.
        drawn = torch.from_numpy(weights.T.astype(np.float32))  # [N, S]
        objects = self._objects.T @ drawn.double()
        objects = objects.view(self.num_classes, len(AREAS), -1)  # [K, A, S]
        found = torch.full((len(THRESHOLDS), *objects.shape), torch.nan, dtype=torch.float64)
        for k, of_class in enumerate(self._ranked):
            for a, ranked in enumerate(of_class):
                if objects[k, a].any():
                    found[:, k, a] = _in_parts(ranked, objects[k, a], drawn)
        of_class = found.mean(dim=0)  # [K, A, S]; a class has all thresholds or none
        means = [of_class[:, 0], found[_T50, :, 0], found[_T75, :, 0]]
        means += [of_class[:, a] for a in range(1, len(AREAS))]
        columns = [part.nanmean(dim=0) for part in means]
        return torch.stack([*columns, *of_class[:, 0]], dim=1).numpy()


def _object_counts(record: ApRecord, num_classes: int) -> Tensor:
    """[N, K A] objects of each image, class and area."""
    images, classes = record.objects.astype(np.int64)
    counts = np.zeros((len(record.images), num_classes, len(AREAS)))
    for a, (low, high) in enumerate(_BOUNDS):
        inside = (record.areas >= low) & (record.areas <= high)
        np.add.at(counts[..., a], (images[inside], classes[inside]), 1)
    return torch.from_numpy(counts.reshape(len(counts), -1))


def _ranked(record: ApRecord, order: NDArray[np.int64], area: int) -> _Ranked:
    counts = record.counts[order, :, area]  # [D, T]
    order, counts = order[counts.any(axis=1)], counts[counts.any(axis=1)]
    images, right = record.found[0][order].astype(np.int64), record.right[order, :, area]
    events = np.flatnonzero(right.any(axis=1) | ~counts.all(axis=1))  # [P]
    last = events[-1] + 1 if len(events) else 0  # nothing behind the last event matters
    curves = []
    for t in range(len(THRESHOLDS)):
        inside, out = np.flatnonzero(right[events, t]), np.flatnonzero(~counts[events, t])
        parts = (inside, images[events[inside]], out, images[events[out]])
        curves.append(_Curve(*map(torch.from_numpy, (*parts, np.searchsorted(out, inside)))))
    starts = np.concatenate([[0], events[:-1] + 1])[: len(events)]
    return _Ranked(torch.from_numpy(images[:last]), torch.from_numpy(starts), curves)


def _in_parts(ranked: _Ranked, objects: Tensor, drawn: Tensor) -> Tensor:
    """[T, S], some samples at a time: so memory does not grow with the class."""
    size = max(1, _MOST // max(1, len(ranked.starts)))
    parts = zip(objects.split(size), drawn.split(size, dim=1), strict=True)
    return torch.cat([_average_precision(ranked, o, d.contiguous()) for o, d in parts], dim=1)


def _average_precision(ranked: _Ranked, objects: Tensor, drawn: Tensor) -> Tensor:
    """[T, S]; NaN where no object was drawn."""
    found = torch.zeros(len(ranked.curves), len(objects), dtype=torch.float64)
    if len(ranked.starts):
        bags = F.embedding_bag(ranked.images, drawn, ranked.starts, mode="sum")  # [P, S]
        counted = _running(bags)
        for t, curve in enumerate(ranked.curves):
            if len(curve.events):
                found[t] = _area_below(curve, counted, objects, drawn)
    found[:, objects == 0] = torch.nan
    return found


def _area_below(curve: _Curve, counted: Tensor, objects: Tensor, drawn: Tensor) -> Tensor:
    right = _running(drawn[curve.images])  # [J, S]
    total = counted[curve.events]
    if len(curve.out):
        outside = _running(drawn[curve.out_images])
        total = total - F.pad(outside, (0, 0, 1, 0))[curve.out_before]
    best = (right / (total + _TINY)).numpy()
    for j in range(len(best) - 2, -1, -1):  # the maximum from here to the end
        np.maximum(best[j], best[j + 1], out=best[j])
    reached = _recalls_reached(right / objects.clamp(min=1)).numpy()
    reached[1:] -= reached[:-1].copy()  # each recall is booked where it is reached first
    return torch.from_numpy((best * reached).sum(axis=0) / len(_RECALLS))


def _recalls_reached(recall: Tensor) -> Tensor:
    """How many of the recalls are not above a value: the next one decides."""
    nearest = (recall * (len(_RECALLS) - 1)).round().long()
    return nearest + (_RECALLS[nearest] <= recall)


def _running(rows: Tensor) -> Tensor:
    """Running sum over the rows, exact."""
    return rows.cumsum(dim=0, dtype=torch.float64)
