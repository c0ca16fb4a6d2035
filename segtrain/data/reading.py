"""Image and label files as arrays, with errors that name the file.

Letters: H W picture.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from segtrain.data.datasets.layout import Layout, Sample
from segtrain.data.labels import Labels
from segtrain.errors import UserError

# Modes whose pixels are one number each.
_ONE_NUMBER = ("L", "P", "I", "I;16", "I;16B", "I;16L")
_BROKEN = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Open a picture; a file that cannot be decoded is an error of the user.

    Args:
        path: File.

    Yields:
        The picture, not decoded yet.

    Raises:
        UserError: If the file is missing, no picture, or damaged.
    """
    try:
        with Image.open(path) as picture:
            yield picture
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"no file {path}") from error
    except _BROKEN as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if str(path) in reason:
            reason = "no picture of a known format"
        raise UserError(f"cannot read {path}: {reason}; copy it again") from error


def read_image(path: Path) -> NDArray[np.uint8]:
    """An image as RGB; grey images get three equal channels, transparency is dropped.

    Args:
        path: File of an 8-bit picture.

    Returns:
        uint8 [H, W, 3].

    Raises:
        UserError: If the file cannot be read, or has more than 8 bits.
    """
    with opened(path) as picture:
        refuse_deep(picture, path)
        return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))


def refuse_deep(picture: Image.Image, path: Path) -> None:
    """Refuse an image that does not fit into bytes; converting it would clip.

    Args:
        picture: An image, opened.
        path: Its file.

    Raises:
        UserError: If it has more than 8 bits per channel.
    """
    if picture.mode.startswith(("I", "F")):
        raise UserError(
            f"{path}: expected an image of 8 bits per channel, got mode {picture.mode}; "
            "write it as 8-bit PNG or JPEG"
        )


def read_stored(path: Path, *, colours: bool = False) -> NDArray[np.integer]:
    """A label map as it is on disk; a palette picture gives its indices, not its colours.

    Args:
        path: File.
        colours: Whether the label map is a picture in colours.

    Returns:
        Integers [H, W], or uint8 RGB [H, W, 3] with `colours`.

    Raises:
        UserError: If the file cannot be read, or has channels where numbers were expected.
    """
    with opened(path) as picture:
        if colours:
            return np.array(picture.convert("RGB"))
        if picture.mode == "1":
            return np.array(picture, dtype=np.uint8)
        if picture.mode not in _ONE_NUMBER:
            raise UserError(
                f"{path}: expected a label map of one channel, got mode {picture.mode}; colours "
                "are read with data.folder.palette, see: segtrain data check"
            )
        return np.array(picture)


def read_labels(layout: Layout, sample: Sample) -> Labels:
    """Class numbers of a sample.

    Args:
        layout: The data set.
        sample: One of its samples.

    Returns:
        uint8 [H, W]: 0..K-1, or 255.

    Raises:
        UserError: If the file is missing, damaged, or holds an unknown value.
    """
    if sample.label is None:
        raise UserError(f"{sample.name} of {layout.name} has no labels; take another split")
    stored = read_stored(sample.label, colours=layout.encoding.colours)
    try:
        return layout.decode(stored)
    except UserError as error:
        raise UserError(f"{sample.label}: {error}; see: segtrain data check") from error
