"""Pictures of a data set: image, labels over it, and training crops as the model sees them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from segtrain.data.dataset import generator_of
from segtrain.data.datasets import Layout, Sample
from segtrain.data.reading import read_image, read_labels
from segtrain.data.transforms import TrainTransform
from segtrain.errors import UserError
from segtrain.files import replacing
from segtrain.visual import overlay, side_by_side, with_legend

Picture = NDArray[np.uint8]


def show(
    layout: Layout,
    split: str,
    *,
    out: Path,
    num: int,
    transform: TrainTransform | None = None,
    seed: int = 0,
) -> list[Path]:
    """Write a picture per sample, evenly spread over the split.

    Args:
        layout: The data set.
        split: Name of a split with labels.
        out: Folder; missing parents are made.
        num: How many samples at most.
        transform: Shows two crops of this augmentation beside the whole image; None shows none.
        seed: Seed of the augmentation.

    Returns:
        The files, PNG.

    Raises:
        UserError: If a file cannot be read or written, or a label is unknown.
    """
    samples = layout.samples(split)
    if num < 1:
        raise UserError(f"--num must be at least 1, got {num}")
    count = min(num, len(samples))
    written = []
    for index in (k * len(samples) // count for k in range(count)):
        picture = sample_picture(layout, samples, index, transform=transform, seed=seed)
        path = out / f"{samples[index].name.replace('/', '_')}.png"
        _save(picture, path)
        written.append(path)
    return written


def sample_picture(
    layout: Layout,
    samples: Sequence[Sample],
    index: int,
    *,
    transform: TrainTransform | None = None,
    seed: int = 0,
) -> Picture:
    """One sample: image, labels over it, crops, and a legend of the classes that occur.

    Args:
        layout: The data set.
        samples: Of a split.
        index: Which one.
        transform: As in `show`.
        seed: Seed of the augmentation.

    Returns:
        RGB, uint8.

    Raises:
        UserError: If a file cannot be read, or a label is unknown.
    """
    image, labels = read_image(samples[index].image), read_labels(layout, samples[index])
    if image.shape[:2] != labels.shape:
        raise UserError(f"{samples[index].label}: another size than its image")
    panels = [image, overlay(image, labels, layout.classes)]
    if transform is not None:
        for crop, crop_labels in _crops(image, labels, transform, seed, index):
            panels.append(overlay(crop, crop_labels, layout.classes))
    return with_legend(side_by_side(_equal_heights(panels)), layout.classes, labels)


def _crops(
    image: Picture, labels: Picture, transform: TrainTransform, seed: int, index: int
) -> Iterator[tuple[Picture, Picture]]:
    """The crops of epochs 0 and 1, the very ones that training with this seed sees."""
    for epoch in (0, 1):
        pixels, numbers = transform.cut(
            torch.from_numpy(image).permute(2, 0, 1),
            torch.from_numpy(labels),
            generator_of(seed, epoch, index),
        )
        yield np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()), numbers.numpy()


def _equal_heights(panels: Sequence[Picture]) -> list[Picture]:
    """Panels padded at the bottom with white to the tallest."""
    height = max(len(panel) for panel in panels)
    return [
        np.pad(panel, ((0, height - len(panel)), (0, 0), (0, 0)), constant_values=255)
        for panel in panels
    ]


def _save(picture: Picture, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as fresh:
            Image.fromarray(picture).save(fresh, format="PNG")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
