"""Paired bootstrap over images: what would other images of the same kind say of A and B?

Images are drawn with replacement, as many as there are, the same for both sides, and every sample
is scored as a data set is.

Letters: S samples, N images, M scores.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
_ROWS = 512  # samples at a time
_CHUNK = 1 << 23  # and numbers of the largest array
Floats = NDArray[np.float64]
Scorer = Callable[[Floats], Floats]  # [S, N] how often images are drawn -> [S, M]


@dataclass(frozen=True)
class Difference:
    """One score of two sides, from 0 to 1; NaN where there is nothing to be scored.

    Attributes:
        a: Score of A on all images.
        b: Score of B.
        low: Lower end of the interval of B - A.
        high: Upper end.
        b_is_better: Share of the samples in which B's score is higher; equal ones count half.
    """

    a: float
    b: float
    low: float
    high: float
    b_is_better: float

    @property
    def difference(self) -> float:
        """B - A."""
        return self.b - self.a

    @property
    def is_known(self) -> bool:
        """Whether there is anything to compare."""
        return not np.isnan(self.low)

    @property
    def is_told(self) -> bool:
        """Whether zero lies outside of the interval."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(
    sides: Sequence[Scorer], num_images: int, *, samples: int, seed: int
) -> list[Difference]:
    """Differences of all scores with their intervals, by percentiles.

    Args:
        sides: Of A and of B.
        num_images: N.
        samples: S.
        seed: Of the drawing.

    Returns:
        M differences.
    """
    a, b = (side(np.ones((1, num_images)))[0] for side in sides)
    generator = np.random.default_rng(seed)
    rows = max(1, min(_ROWS, _CHUNK // num_images))
    parts = []
    for start in range(0, samples, rows):
        drawn = times_drawn(generator, min(rows, samples - start), num_images)
        of_a, of_b = (side(drawn) for side in sides)
        parts.append(of_b - of_a)
    found = np.concatenate(parts)
    return [
        _difference(float(x), float(y), column) for x, y, column in zip(a, b, found.T, strict=True)
    ]


def times_drawn(generator: np.random.Generator, rows: int, num_images: int) -> Floats:
    """How often each image is drawn.

    Args:
        generator: Of random numbers.
        rows: S.
        num_images: N.

    Returns:
        [S, N]; a row sums up to N.
    """
    images = generator.integers(0, num_images, (rows, num_images))
    cells = images + num_images * np.arange(rows)[:, None]
    counted = np.bincount(cells.ravel(), minlength=rows * num_images)
    return counted.reshape(rows, num_images).astype(np.float64)


def _difference(a: float, b: float, drawn: Floats) -> Difference:
    known = drawn[~np.isnan(drawn)]
    if np.isnan(a) or np.isnan(b) or not known.size:
        return Difference(a, b, *(float("nan"),) * 3)
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    better = (np.sign(known).mean() + 1) / 2
    return Difference(a, b, float(low), float(high), float(better))
