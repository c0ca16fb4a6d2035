"""Numbers of a data set: pixels and images of each class, sizes, mean and deviation of the pixels.

Letters: K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from segtrain.data.check import SplitReport
from segtrain.data.datasets import Layout, Sample
from segtrain.data.labels import ClassSet
from segtrain.data.reading import read_image

_IMAGES_READ = 200  # evenly spread over the split; more changes the third digit at most


@dataclass(frozen=True)
class PixelStatistics:
    """Mean and deviation of RGB values in 0..1.

    Attributes:
        mean: Per channel.
        std: Per channel, over all pixels.
        images: How many images were read.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int


def pixel_statistics(samples: Sequence[Sample], *, limit: int = _IMAGES_READ) -> PixelStatistics:
    """Mean and deviation of the pixels of a split.

    Args:
        samples: Of a split.
        limit: Most images to read, evenly spread.

    Returns:
        The statistics, summed in integers.

    Raises:
        UserError: If an image cannot be read.
    """
    chosen = [
        samples[k * len(samples) // min(limit, len(samples))]
        for k in range(min(limit, len(samples)))
    ]
    pixels, sums, squares = 0, np.zeros(3, np.int64), np.zeros(3, np.int64)
    for sample in chosen:
        image = read_image(sample.image).reshape(-1, 3)
        counts = np.stack([np.bincount(channel, minlength=256) for channel in image.T])
        pixels += len(image)
        sums += counts @ np.arange(256)
        squares += counts @ np.arange(256) ** 2
    mean = sums / pixels
    std = np.sqrt(squares / pixels - mean**2)
    return PixelStatistics(tuple((mean / 255).tolist()), tuple((std / 255).tolist()), len(chosen))


def class_table(report: SplitReport, classes: ClassSet) -> list[tuple[str, int, float, int]]:
    """What the split has of each class.

    Args:
        report: Of `check_layout`, with decoded labels.
        classes: The classes.

    Returns:
        (name, pixels, share of the pixels that are not ignored, images) of each of K classes.
    """
    total = max(sum(report.pixels), 1)
    rows = zip(classes.names, report.pixels, report.presence, strict=True)
    return [(name, pixels, pixels / total, images) for name, pixels, images in rows]


def statistics_json(report: SplitReport, layout: Layout, pixels: PixelStatistics) -> dict[str, Any]:
    """All numbers of a split as plain types.

    Args:
        report: Of `check_layout`, with decoded labels.
        layout: The data set.
        pixels: Of the same split.

    Returns:
        A dict for `json.dump`.
    """
    return {
        "split": report.split,
        "images": report.images,
        "sizes": {f"{w}x{h}": count for (w, h), count in report.sizes.most_common()},
        "mean": list(pixels.mean),
        "std": list(pixels.std),
        "images_read_for_mean": pixels.images,
        "ignored_pixels": report.ignored,
        "classes": [
            {"name": name, "pixels": count, "share": share, "images": images}
            for name, count, share, images in class_table(report, layout.classes)
        ],
    }


def statistics_lines(report: SplitReport, layout: Layout, pixels: PixelStatistics) -> list[str]:
    """All numbers of a split as a table to read.

    Args:
        report: Of `check_layout`, with decoded labels.
        layout: The data set.
        pixels: Of the same split.

    Returns:
        Lines.
    """
    sizes = ", ".join(f"{w}x{h} ({count})" for (w, h), count in report.sizes.most_common(4))
    more = f" and {len(report.sizes) - 4} more" if len(report.sizes) > 4 else ""
    ignored = report.ignored / max(report.ignored + sum(report.pixels), 1)
    width = max(len(name) for name in layout.classes.names)
    mean, std = (" ".join(f"{v:.3f}" for v in part) for part in (pixels.mean, pixels.std))
    return [
        f"{report.split}: {report.images} images, {ignored:.1%} of the pixels ignored",
        f"  sizes: {sizes}{more}",
        f"  RGB of {pixels.images} images: mean {mean}, deviation {std}",
        f"  {'class':<{width}}  {'pixels':>8}  images",
        *(
            f"  {name:<{width}}  {share:8.3%}  {images:6d}"
            for name, _, share, images in class_table(report, layout.classes)
        ),
    ]
