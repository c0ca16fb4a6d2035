"""Paired bootstrap over images: what would other images of the same kind say of A and B?

Images are drawn with replacement, as many as there are, the same for both sides. The counts of the
drawn images are summed and scored as a split is, so that mIoU stays a ratio of sums and no mean
over images. Classes that occur in neither side of a drawn sample are left out of its mean.

Letters: S samples, N images, K classes, M scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from segtrain.evaluation.confusion import fraction

LEVEL = 0.95
_CHUNK = 1 << 20  # numbers of the largest array at a time
Floats = NDArray[np.float64]
Parts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Difference:
    """One score of two sides, from 0 to 1; NaN where there is nothing to be scored.

    Attributes:
        a: Score of A on all images.
        b: Score of B.
        low: Lower end of the interval of B - A.
        high: Upper end.
        sign_probability: Share of the samples in which B - A has the sign that it has on all
            images; where it is zero, a half counts.
    """

    a: float
    b: float
    low: float
    high: float
    sign_probability: float

    @property
    def difference(self) -> float:
        """B - A."""
        return self.b - self.a

    @property
    def is_told(self) -> bool:
        """Whether zero lies outside of the interval."""
        return self.low > 0 or self.high < 0


def scores_of(right: Floats, union: Floats, groups: Parts = ()) -> Floats:
    """Scores of summed counts.

    Args:
        right: [S, K], pixels that are right.
        union: [S, K], pixels in ground truth or prediction.
        groups: Classes of each group.

    Returns:
        [S, M]: mIoU, pixel accuracy, mIoU of each group, IoU of each class.
    """
    iou = fraction(right, union)
    all_right = right.sum(axis=1)
    # Every pixel lies in one union, or in two where it is wrong.
    total = (all_right + union.sum(axis=1)) / 2
    means = [_known_mean(iou[:, list(part)]) for part in groups]
    return np.column_stack([_known_mean(iou), fraction(all_right, total), *means, iou])


def paired_bootstrap(
    right: tuple[Floats, Floats],
    union: tuple[Floats, Floats],
    groups: Parts = (),
    *,
    samples: int = 10_000,
    seed: int = 0,
) -> list[Difference]:
    """Differences of all scores with their intervals, by percentiles.

    Args:
        right: Of A and of B, [N, K]: pixels of each image and class that are right.
        union: Of A and of B, [N, K]: pixels in ground truth or prediction.
        groups: Classes of each group.
        samples: S.
        seed: Of the drawing.

    Returns:
        M differences, in the order of `scores_of`.
    """
    drawn = _drawn_differences(right, union, groups, samples=samples, seed=seed)
    a, b = (
        scores_of(r.sum(axis=0, keepdims=True), u.sum(axis=0, keepdims=True), groups)[0]
        for r, u in zip(right, union, strict=True)
    )
    return [
        _difference(float(of_a), float(of_b), column)
        for of_a, of_b, column in zip(a, b, drawn.T, strict=True)
    ]


def _drawn_differences(
    right: tuple[Floats, Floats],
    union: tuple[Floats, Floats],
    groups: Parts,
    *,
    samples: int,
    seed: int,
) -> Floats:
    """B - A of all scores: [S, M]. A sum of integers below 2^53 is exact in float64."""
    generator = np.random.default_rng(seed)
    num_images, num_classes = right[0].shape
    counts = np.concatenate([right[0], union[0], right[1], union[1]], axis=1)  # [N, 4K]
    rows = max(1, _CHUNK // max(counts.shape))
    found = np.empty((samples, 2 + len(groups) + num_classes))
    for start in range(0, samples, rows):
        part = found[start : start + rows]
        summed = _times_drawn(generator, len(part), num_images) @ counts
        right_a, union_a, right_b, union_b = np.split(summed, 4, axis=1)
        part[:] = scores_of(right_b, union_b, groups) - scores_of(right_a, union_a, groups)
        del summed, right_a, union_a, right_b, union_b  # before the next ones are made
    return found


def _times_drawn(generator: np.random.Generator, rows: int, num_images: int) -> Floats:
    """How often each image is drawn: [rows, N]; a row sums up to N."""
    images = generator.integers(0, num_images, (rows, num_images))
    cells = images + num_images * np.arange(rows)[:, None]
    counted = np.bincount(cells.ravel(), minlength=rows * num_images)
    return counted.reshape(rows, num_images).astype(np.float64)


def _difference(a: float, b: float, drawn: Floats) -> Difference:
    known = drawn[~np.isnan(drawn)]
    if np.isnan(a) or np.isnan(b) or not known.size:
        return Difference(a, b, *(float("nan"),) * 3)
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    agree = np.sign(known) * np.sign(b - a)
    return Difference(a, b, float(low), float(high), float((1 + agree.mean()) / 2))


def _known_mean(values: Floats) -> Floats:
    """Mean of the numbers of each row that are not NaN; NaN where there are none."""
    return fraction(np.nansum(values, axis=1), np.count_nonzero(~np.isnan(values), axis=1))
