"""What was counted in every image of a split, to compare two models on the same images.

One `.npz` file beside the scores: no pickle, a few hundred kilobytes for 500 street scenes, and
everything that `segtrain runs compare` has to check.

Letters: N images, K classes, E filled cells of all confusion matrices, g ground truth,
p prediction.
"""

import json
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segtrain import dist
from segtrain.errors import UserError
from segtrain.evaluation.confusion import ConfusionMatrix
from segtrain.evaluation.size_groups import ClassSizes
from segtrain.files import plain, replacing

VERSION = 1
_ABOUT = {"version": int, "dataset": str, "split": str, "classes": list, "inference": dict}
_MOST_BYTES = 2 << 30  # a file that unpacks to more was not written here
# What zipfile and numpy raise on the way; encrypted archives and deep nesting are a RuntimeError.
_DAMAGED = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
Counts = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class ImageCounts:
    """The confusion matrix of every image, filled cells only.

    Attributes:
        about: "dataset", "split", "classes" and "inference", perhaps more.
        images: Names of the images within their split.
        cells: int64 [4, E]: image, g, p, pixels.
        void: int64 [N], pixels without a class in the ground truth.
        sizes: int64 [3, K]: area, components and images of each class in the whole split.
    """

    about: Mapping[str, Any]
    images: tuple[str, ...]
    cells: Counts
    void: Counts
    sizes: Counts

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return tuple(self.about["classes"])

    def right(self) -> NDArray[np.float64]:
        """Pixels of each image and class that are right: [N, K], exact."""
        image, truth, predicted, pixels = self.cells[:, self.cells[1] == self.cells[2]]
        return self._summed(image, predicted, pixels)

    def truth(self) -> NDArray[np.float64]:
        """Pixels of each image and class in the ground truth: [N, K], exact."""
        return self._summed(self.cells[0], self.cells[1], self.cells[3])

    def union(self) -> NDArray[np.float64]:
        """Pixels of each image and class in ground truth or prediction: [N, K], exact."""
        predicted = self._summed(self.cells[0], self.cells[2], self.cells[3])
        return self.truth() + predicted - self.right()

    def _summed(self, image: Counts, label: Counts, pixels: Counts) -> NDArray[np.float64]:
        shape = len(self.images), len(self.classes)
        cell = image * shape[1] + label
        return np.bincount(cell, pixels, minlength=shape[0] * shape[1]).reshape(shape)

    def class_sizes(self) -> ClassSizes:
        """What ranks small, medium and large classes."""
        sizes = ClassSizes(len(self.classes))
        sizes.area, sizes.components, sizes.images = self.sizes
        return sizes


class Recorder:
    """Keeps what is counted, image by image."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, Counts, int]] = []

    def add(self, name: str, matrix: ConfusionMatrix) -> None:
        """Keep one image.

        Args:
            name: Of the image within its split.
            matrix: Of this image alone.
        """
        truth, predicted = np.nonzero(matrix.counts)
        cells = np.stack([truth, predicted, matrix.counts[truth, predicted]])
        self._rows.append((name, cells, matrix.num_void))

    def gather(self) -> None:
        """Take the rows of all processes, each of which has every n-th image, in their order."""
        parts = dist.gather_objects(self._rows)
        rows: list[Any] = [None] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            rows[rank :: len(parts)] = part
        self._rows = rows

    def counts(self, about: Mapping[str, Any], sizes: ClassSizes) -> ImageCounts:
        """What was kept.

        Args:
            about: As in `ImageCounts`.
            sizes: Of the whole split.

        Returns:
            The counts.
        """
        names, cells, void = zip(*self._rows, strict=True)
        numbers = np.repeat(np.arange(len(cells)), [part.shape[1] for part in cells])
        return ImageCounts(
            about=about,
            images=names,
            cells=np.vstack([numbers, np.concatenate(cells, axis=1)]),
            void=np.asarray(void, np.int64),
            sizes=np.stack([sizes.area, sizes.components, sizes.images]),
        )


def write_counts(path: Path, counts: ImageCounts) -> None:
    """Write the file whole or not at all.

    Args:
        path: Ends with ".npz".
        counts: What to write.
    """
    about = json.dumps(plain({"version": VERSION, **counts.about}), allow_nan=False)
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(
            file,
            about=np.array(about),
            images=np.array(counts.images),
            cells=counts.cells,
            void=counts.void,
            sizes=counts.sizes,
        )


def read_counts(path: Path) -> ImageCounts:
    """Read a file of `write_counts`; nothing in it is executed, and everything is checked.

    Args:
        path: The file.

    Returns:
        The counts.

    Raises:
        UserError: If it is missing, damaged or something else.
    """
    if not path.is_file():
        raise UserError(f"no file {path}; write it by: segtrain eval RUN --out scores.json")
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(part.file_size for part in archive.infolist()) > _MOST_BYTES:
                raise ValueError("it unpacks to more than 2 GiB")
        with np.load(path, allow_pickle=False) as stored:
            about = json.loads(str(stored["about"]))
            images = stored["images"]
            numbers = {name: stored[name] for name in ("cells", "void", "sizes")}
        _check(about, images, numbers)
    except _DAMAGED as error:
        raise UserError(
            f"{path} holds no counts of images ({_first_line(error)}); "
            "write it again by: segtrain eval"
        ) from error
    return ImageCounts(about=about, images=tuple(map(str, images)), **numbers)


def _check(about: Any, images: NDArray[Any], numbers: Mapping[str, NDArray[Any]]) -> None:
    """Refuse what would go wrong later, or be counted wrongly."""
    if not isinstance(about, dict):
        raise ValueError("'about' is no mapping")
    for key, kind in _ABOUT.items():
        if not isinstance(about.get(key), kind):
            raise ValueError(f"'about' has no {key}")
    if not all(isinstance(name, str) for name in about["classes"]):
        raise ValueError("'about' has classes that are no text")
    if about["version"] != VERSION:
        raise ValueError(f"version {about['version']}, this program reads {VERSION}")
    num_images, num_classes = images.size, len(about["classes"])
    if images.ndim != 1 or images.dtype.kind != "U" or not num_images:
        raise ValueError("'images' is no list of names")
    shapes = {
        "cells": (4, *numbers["cells"].shape[1:2]),
        "void": (num_images,),
        "sizes": (3, num_classes),
    }
    for key, shape in shapes.items():
        array = numbers[key]
        if array.dtype != np.int64 or array.shape != shape or (array < 0).any():
            raise ValueError(f"{key!r} is {array.dtype} {list(array.shape)} or negative")
    image, truth, predicted, _ = numbers["cells"]
    limits = ((image, num_images), (truth, num_classes), (predicted, num_classes))
    if any((index >= limit).any() for index, limit in limits):
        raise ValueError("'cells' names an image or a class that is not there")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
