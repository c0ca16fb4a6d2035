"""Image and label files as arrays, with errors that name the file.

Letters: H W picture.
"""

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from segtrain.data.datasets.layout import Layout, Sample
from segtrain.data.labels import Labels
from segtrain.errors import UserError

# What data sets consist of. Pillow knows more; some of that starts other programs (EPS).
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000")
# Modes whose pixels are one number each.
_ONE_NUMBER = ("L", "P", "I", "I;16", "I;16B", "I;16L")
# Modes of which nothing is lost in bytes, but for transparency.
_BYTES = ("1", "CMYK", "HSV", "L", "LA", "LAB", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "YCbCr")
# Decoders of damaged files raise whatever they like.
_BROKEN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    UnidentifiedImageError,
    struct.error,
    zlib.error,
)
_ORIENTATION = 0x0112  # EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = (5, 6, 7, 8)


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
        # A pipe or a device would be waited for, or has no end.
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is no file; take it out, or put a picture in its place")
        with Image.open(path, formats=FORMATS) as picture:
            yield picture
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"no file {path}") from error
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{path} has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels; cut it into tiles"
        ) from error
    except _BROKEN as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, UnidentifiedImageError) or str(path) in reason:
            reason = "no picture of a known format"
        raise UserError(f"cannot read {path}: {reason}; copy it again") from error


def upright(picture: Image.Image) -> Image.Image:
    """A picture as viewers show it, and as those who annotate see it.

    Args:
        picture: Opened.

    Returns:
        The picture, decoded and turned as its EXIF orientation says.
    """
    picture.load()  # a TIFF turns itself here
    turn = _TURNS.get(_orientation(picture))
    return picture if turn is None else picture.transpose(turn)


def upright_size(picture: Image.Image, *, decode: bool) -> tuple[int, int]:
    """Size of what `upright` gives.

    Args:
        picture: Opened.
        decode: Whether to decode all of it, so that damage shows.

    Returns:
        Width and height.
    """
    if decode or picture.format == "TIFF":
        picture.load()
    # To look for EXIF behind its pixels, a PNG would be decoded.
    look = decode or picture.format != "PNG" or "exif" in picture.info
    lies = look and _orientation(picture) in _ON_ITS_SIDE
    return picture.size[::-1] if lies else picture.size


def _orientation(picture: Image.Image) -> object:
    try:
        return picture.getexif().get(_ORIENTATION, 1)
    except _BROKEN:  # what is damaged there, is not damaged in the pixels
        return 1


def read_image(path: Path) -> NDArray[np.uint8]:
    """An image as RGB, upright; grey images get three equal channels, transparency is dropped.

    Args:
        path: File of an 8-bit picture.

    Returns:
        uint8 [H, W, 3].

    Raises:
        UserError: If the file cannot be read, or has more than 8 bits.
    """
    with opened(path) as picture:
        refuse_deep(picture, path)
        picture = upright(picture)
        return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))


def refuse_deep(picture: Image.Image, path: Path) -> None:
    """Refuse an image that does not fit into bytes; converting it would clip.

    Args:
        picture: An image, opened.
        path: Its file.

    Raises:
        UserError: If it has more than 8 bits per channel.
    """
    if picture.mode not in _BYTES:
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
            refuse_deep(picture, path)
            return np.array(upright(picture).convert("RGB"))
        if picture.mode == "1":
            return np.array(upright(picture), dtype=np.uint8)
        if picture.mode not in _ONE_NUMBER:
            raise UserError(
                f"{path}: expected a label map of one channel, got mode {picture.mode}; colours "
                "are read with data.folder.palette, see: segtrain data check"
            )
        return np.array(upright(picture))


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
