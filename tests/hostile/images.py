"""Pictures that people have, and pictures that somebody broke."""

import io
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 5, 7
ORIENTATION = 0x0112
# Mode, format and ending; all of them are images of 8 bits.
WELCOME = (
    ("1", "PNG", ".png"),
    ("L", "PNG", ".png"),
    ("LA", "PNG", ".png"),
    ("P", "PNG", ".png"),
    ("RGB", "PNG", ".png"),
    ("RGBA", "PNG", ".png"),
    ("P", "GIF", ".bmp"),  # what a file is, its content tells
    ("L", "JPEG", ".jpg"),
    ("RGB", "JPEG", ".png"),
    ("CMYK", "JPEG", ".jpeg"),
    ("CMYK", "TIFF", ".tif"),
    ("YCbCr", "TIFF", ".tiff"),
    ("LAB", "TIFF", ".tif"),
    ("RGBA", "WEBP", ".webp"),
    ("RGB", "BMP", ".bmp"),
    ("RGB", "PPM", ".jpg"),
    ("RGB", "JPEG2000", ".jpg"),
)
# Modes that hold more than a byte; in bytes they would be clipped.
DEEP = (("I;16", "PNG", ".png"), ("I", "TIFF", ".tif"), ("F", "TIFF", ".tif"), ("I", "PPM", ".png"))
# No pictures at all, or none that a data set holds.
STRANGE = {
    "nothing": b"",
    "zero": b"\0",
    "text": b"road\nsky\n",
    "page": b"<html><body>404 Not Found</body></html>",
    "drawing": b"<svg xmlns='http://www.w3.org/2000/svg' width='5' height='5'/>",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 5\n(/bin/sh) run\n",
    "document": b"%PDF-1.4\n%%EOF\n",
    "archive": b"PK\x03\x04" + b"\0" * 60,
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "signature": b"\x89PNG\r\n\x1a\n",
    "start": b"\xff\xd8\xff\xe0",
}


ODD = ("nowhere", "itself", "pipe", "folder")


@dataclass(frozen=True)
class Intact:
    """A picture that reads, to be damaged."""

    name: str
    suffix: str
    content: bytes


def pixels(height: int = HEIGHT, width: int = WIDTH, *, seed: int = 0) -> np.ndarray:
    """Noise, RGB."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    """The content of a file."""
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()


def picture_of(mode: str, *, height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """Noise of a mode."""
    if mode in ("I;16", "I", "F"):
        deep = np.arange(height * width).reshape(height, width) * 999
        return Image.fromarray(
            deep.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])
        )
    noise = Image.fromarray(pixels(height, width))
    if mode in ("YCbCr", "CMYK", "L", "1", "P"):
        return noise.convert(mode)
    if mode == "LAB":
        return Image.merge("LAB", noise.split())
    alpha = Image.fromarray(pixels(height, width, seed=1)[..., 0])
    if mode == "LA":
        return Image.merge("LA", (noise.convert("L"), alpha))
    if mode == "RGBA":
        noise.putalpha(alpha)
    return noise


def intact() -> Iterator[Intact]:
    """One small file of every kind."""
    for mode, kind, suffix in WELCOME:
        yield Intact(f"{mode} {kind}", suffix, encoded(picture_of(mode), kind))


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """A part of a PNG, with a true check sum."""
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def png(width: int, height: int, rows: bytes, *, depth: int = 8, colours: int = 2) -> bytes:
    """A PNG that claims a size, whatever its rows hold."""
    head = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in parts)


def png_of_16_bits(values: np.ndarray) -> bytes:
    """An RGB picture of two bytes a channel, which Pillow cannot write."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(width, height, rows, depth=16)


def turned(orientation: object, kind: str) -> bytes:
    """A picture whose EXIF says how it is to be held."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    return encoded(Image.fromarray(pixels()), kind, exif=exif, **options)


def as_held(array: np.ndarray, orientation: int) -> np.ndarray:
    """What a viewer shows of an array [H, W, ...], by the EXIF standard's table of rows."""
    # Whether rows are columns, then whether rows and columns run backwards.
    swap, down, right = {
        1: (False, 1, 1),
        2: (False, 1, -1),
        3: (False, -1, -1),
        4: (False, -1, 1),
        5: (True, 1, 1),
        6: (True, 1, -1),
        7: (True, -1, -1),
        8: (True, -1, 1),
    }[orientation]
    array = array.swapaxes(0, 1) if swap else array
    return array[::down, ::right]


def put(path: Path, content: bytes) -> Path:
    """Write a file in place of whatever is there."""
    if path.is_symlink() or path.exists():
        path.unlink()
    path.write_bytes(content)
    return path


def odd_entries(folder: Path) -> dict[str, Path]:
    """What a folder can hold under the name of a picture that is no file."""
    folder.mkdir(parents=True)
    entries = {name: folder / f"{name}.png" for name in ODD}
    entries["nowhere"].symlink_to(folder / "gone.png")
    entries["itself"].symlink_to(entries["itself"])
    os.mkfifo(entries["pipe"])
    entries["folder"].mkdir()
    return entries
