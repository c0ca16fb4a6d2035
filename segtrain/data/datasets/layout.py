"""What every data set is to the rest: classes, samples of a split, and how labels are read."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segtrain.data.labels import ClassSet, Encoding, Labels
from segtrain.errors import UserError
from segtrain.wording import did_you_mean, first_of

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Sample:
    """One image.

    Attributes:
        image: File of the image.
        label: File of the label map; None where the split has none.
        name: Name within its split.
    """

    image: Path
    label: Path | None
    name: str


@dataclass(frozen=True)
class Layout:
    """A data set; it can be sent to another process.

    Attributes:
        name: Name in a configuration.
        root: Folder of the data set.
        classes: Names and colours.
        encoding: From values or colours on disk to class numbers.
        list_split: (root, split) -> samples in a fixed order, none where the split is unknown.
        splits: Splits that the data set is known for, to name in errors.
        flip_pairs: Classes that change places in a mirrored image.
        one_to_one: Whether every file in the folders of the labels belongs to an image.
    """

    name: str
    root: Path
    classes: ClassSet
    encoding: Encoding
    list_split: Callable[[Path, str], list[Sample]]
    splits: tuple[str, ...] = ("train", "val", "test")
    flip_pairs: tuple[tuple[int, int], ...] = ()
    one_to_one: bool = False

    def samples(self, split: str) -> list[Sample]:
        """Samples of a split, in a fixed order.

        Args:
            split: Name of a split, or several joined by "+".

        Returns:
            At least one sample.

        Raises:
            UserError: If the folder or the split is missing or empty.
        """
        if not self.root.is_dir():
            raise UserError(f"data.root: no folder {self.root}; name where {self.name} lies")
        samples = [s for part in split.split("+") for s in self._part(part)]
        if twice := repeated(sample.name for sample in samples):
            raise UserError(f"split {split!r} names images twice: {first_of(twice)}")
        return samples

    def _part(self, split: str) -> list[Sample]:
        samples = self.list_split(self.root, split)
        if not samples:
            hint = did_you_mean(split, self.splits)
            raise UserError(
                f"no images of split {split!r} of {self.name} below {self.root}"
                + (f"; {hint}" if hint and split not in self.splits else "")
            )
        return samples

    def decode(self, stored: NDArray[np.integer]) -> Labels:
        """Class numbers of a label map as read by `read_stored`.

        Args:
            stored: Integers [H, W], or RGB [H, W, 3] for colour encodings.

        Returns:
            uint8 [H, W]: 0..K-1, or 255.

        Raises:
            UserError: If there is a value that the encoding does not list.
        """
        return self.encoding.decode(stored)


def repeated(names: Iterable[str]) -> list[str]:
    """Names that occur more than once, sorted.

    Args:
        names: Any.

    Returns:
        Each of them once.
    """
    return sorted(name for name, count in Counter(names).items() if count > 1)


def files_below(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files with one of the endings, at any depth, sorted by their path below the folder.

    Links are followed. A folder that is reached twice, as in a loop, is looked into once. A link
    that leads nowhere is listed, so that whoever reads it says so.

    Args:
        folder: Where to look; it may be missing.
        suffixes: Lower-case endings of file names; case does not matter.

    Returns:
        Paths; hidden files are left out.

    Raises:
        UserError: If a folder cannot be listed.
    """
    found = [p for p in all_below(folder) if p.name.lower().endswith(suffixes)]
    return sorted(found, key=lambda p: p.relative_to(folder).as_posix())


def all_below(folder: Path) -> Iterator[Path]:
    """Whatever is no folder and not hidden, at any depth, in the sense of `files_below`.

    Args:
        folder: Where to look; it may be missing.

    Yields:
        Paths, in no order.

    Raises:
        UserError: If a folder cannot be listed.
    """
    # Links wait until all real folders were looked into: these give the names.
    waiting, links = [folder] if folder.is_dir() else [], []
    seen: set[tuple[int, int]] = set()
    while waiting or links:
        place = (waiting or links).pop()
        state = place.stat()
        if (state.st_dev, state.st_ino) in seen:
            continue
        seen.add((state.st_dev, state.st_ino))
        for entry in _entries(place):
            if _is_folder(entry):
                (links if entry.is_symlink() else waiting).append(Path(entry.path))
            elif not entry.name.startswith("."):
                yield Path(entry.path)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _entries(folder: Path) -> "list[os.DirEntry[str]]":
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name, reverse=True)
    except OSError as error:
        raise UserError(f"cannot look into {folder}: {error.strerror}; mend its rights") from error


def read_lines(path: Path) -> list[str]:
    """Lines of a text file that are not empty, stripped.

    Args:
        path: UTF-8 text.

    Returns:
        The lines; none where the file is missing.

    Raises:
        UserError: If the file cannot be read as text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; write it as UTF-8 text") from error
    return [line.strip() for line in lines if line.strip()]


def beside(
    images: Iterable[Path], *, below: Path, labels: Path, rename: Callable[[str], str]
) -> list[Sample]:
    """Samples whose labels lie in a parallel tree.

    Args:
        images: Files of the images.
        below: Folder of the images.
        labels: Folder of the labels.
        rename: Name of an image file -> name of its label file.

    Returns:
        A sample per image; the label file need not exist.
    """
    return [
        Sample(
            image=image,
            label=labels / image.relative_to(below).parent / rename(image.name),
            name=image.relative_to(below).with_suffix("").as_posix(),
        )
        for image in images
    ]


def split_folders(
    root: Path, split: str, *, images: dict[str, str], labels: dict[str, str | None]
) -> list[Sample]:
    """Samples of data sets that have one folder of images and one of PNG labels per split.

    Args:
        root: Folder of the data set.
        split: Name of a split.
        images: Split -> folder of images.
        labels: Split -> folder of labels, None where there are none.

    Returns:
        Samples; none where the split is unknown.
    """
    if split not in images:
        return []
    folder, below = labels[split], root / images[split]
    found = files_below(below, IMAGE_SUFFIXES)
    if folder is None:
        return [Sample(p, None, p.relative_to(below).with_suffix("").as_posix()) for p in found]
    return beside(found, below=below, labels=root / folder, rename=as_png)


def as_png(name: str) -> str:
    """Name of the PNG label map of an image file.

    Args:
        name: "a.jpg".

    Returns:
        "a.png".
    """
    return Path(name).with_suffix(".png").name


def by_folders(
    *, images: dict[str, str], labels: dict[str, str | None]
) -> Callable[[Path, str], list[Sample]]:
    """`split_folders` with its folders filled in.

    Args:
        images: Split -> folder of images.
        labels: Split -> folder of labels, None where there are none.

    Returns:
        A function of root and split that can be sent to another process.
    """
    return partial(split_folders, images=images, labels=labels)
