"""Paired differences over seeds and images, and what they say of an expectation.

Letters: S samples of the bootstrap, R seeds, N images, K classes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from segtrain.evaluation.confusion import fraction

LEVEL = 0.95
SAMPLES = 10_000
# Two sides count as equal where the whole interval is closer to zero than this, as a share of 1.
MARGIN = 0.05
EXPECTED = ("method", "equal")
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Scores of both sides from 0 to 1, means over the seeds, and their difference.

    Attributes:
        method: mIoU of the method.
        twin: mIoU of the twin.
        low: Lower end of the interval of method - twin.
        high: Upper end.
        by_seed: method - twin of every seed.
    """

    method: float
    twin: float
    low: float
    high: float
    by_seed: tuple[float, ...]

    @property
    def difference(self) -> float:
        """Method - twin."""
        return self.method - self.twin


def paired(
    method: tuple[Floats, Floats],
    twin: tuple[Floats, Floats],
    *,
    samples: int = SAMPLES,
    seed: int = 0,
) -> Paired:
    """Bootstrap over seeds and, within them, over images; both sides get the same of both.

    All runs are scored on the same images, so a drawn image counts as often in every seed. With
    few seeds the interval is rather too narrow than too wide.

    Args:
        method: Intersections and unions of the method, each [R, N, K].
        twin: Those of the twin.
        samples: S.
        seed: Of the drawing.

    Returns:
        The scores and the interval, by percentiles.
    """
    generator = np.random.default_rng(seed)
    num_seeds, num_images = method[0].shape[:2]
    times = generator.multinomial(num_images, np.full(num_images, 1 / num_images), samples)
    chosen = generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), samples)
    drawn = _scores(method, times) - _scores(twin, times)  # [S, R]
    found = (drawn * chosen).sum(1) / num_seeds
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    once = np.ones((1, num_images))
    of_method, of_twin = _scores(method, once)[0], _scores(twin, once)[0]
    return Paired(
        method=float(of_method.mean()),
        twin=float(of_twin.mean()),
        low=float(low),
        high=float(high),
        by_seed=tuple((of_method - of_twin).tolist()),
    )


def _scores(counts: tuple[Floats, Floats], times: NDArray[np.number]) -> Floats:
    """Mean IoU of images that count so many times [S, N]: [S, R]."""
    summed = (np.einsum("sn,rnk->srk", times, part, optimize=True) for part in counts)
    return np.nanmean(fraction(*summed), axis=-1)


def verdict(expected: str, low: float, high: float) -> str:
    """What an interval says of an expectation.

    Args:
        expected: "method" (the method wins) or "equal".
        low: Lower end of method - twin.
        high: Upper end.

    Returns:
        "as expected", "not shown" (the interval allows both) or "surprise".

    Raises:
        ValueError: If `expected` is unknown.
    """
    if expected not in EXPECTED:
        raise ValueError(f"expected: one of {', '.join(EXPECTED)}, got {expected!r}")
    if expected == "method":
        if low > 0:
            return "as expected"
        return "surprise" if high < 0 else "not shown"
    if -MARGIN < low and high < MARGIN:
        return "as expected"
    return "surprise" if low > 0 or high < 0 else "not shown"
