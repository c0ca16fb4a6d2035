"""Panoptic quality of many resampled sets of images at once: sums of counts, then ratios.

    PQ = sum of IoU / (TP + FP / 2 + FN / 2), averaged over the classes that occur in a sample

Letters: S samples, N images, K classes.
"""

import numpy as np
from numpy.typing import NDArray

from d2ctx.evaluation.pq_records import PqRecord

HEADLINE = ("PQ", "SQ", "RQ", "PQ things", "PQ stuff")
Floats = NDArray[np.float64]


class PqScorer:
    """Scores of one run.

    Args:
        record: Of its segments.
    """

    def __init__(self, record: PqRecord) -> None:
        self.names = (*HEADLINE, *record.about["classes"])
        self._things = np.array(record.about["things"], bool)
        self._counts = np.concatenate(list(record.dense()), axis=1)  # [N, 4K]

    def scores(self, weights: Floats) -> Floats:
        """Score samples.

        Args:
            weights: [S, N] how often each image was drawn.

        Returns:
            [S, 5 + K], from 0 to 1: PQ, SQ, RQ, PQ of things and of stuff, PQ of each class; NaN
            where there is none.
        """
        tp, fp, fn, iou = np.split(weights @ self._counts, 4, axis=1)  # [S, K]
        recognised = tp + fp / 2 + fn / 2
        pq, rq = ratio(iou, recognised), ratio(tp, recognised)
        sq = np.where(tp > 0, ratio(iou, tp), np.where(recognised > 0, 0.0, np.nan))
        kinds = [pq[:, self._things], pq[:, ~self._things]]
        return np.column_stack([*map(known_mean, (pq, sq, rq, *kinds)), pq])


def ratio(part: Floats, whole: Floats) -> Floats:
    """A quotient.

    Args:
        part: Any shape.
        whole: The same shape, not negative.

    Returns:
        part / whole; NaN where whole is zero.
    """
    return np.divide(part, whole, out=np.full_like(whole, np.nan), where=whole > 0)


def known_mean(values: Floats) -> Floats:
    """Means of what is known.

    Args:
        values: [S, K].

    Returns:
        [S] mean of each row without NaN; NaN where nothing is left.
    """
    known = ~np.isnan(values)
    return ratio(np.where(known, values, 0.0).sum(axis=1), known.sum(axis=1).astype(np.float64))
