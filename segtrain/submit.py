"""Results for the server of Cityscapes: label-id PNGs, everything it would refuse, the archive.

Rules (pixel-level task): one 8-bit PNG of one channel for each image, of its size, with label ids
0..33 (never train ids, never 255), and exactly one file anywhere in the archive whose name starts
with `<city>_<sequence>_<frame>`.
"""

import io
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import isnan
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from segtrain.data.datasets import Sample
from segtrain.data.datasets.cityscapes import IMAGE_END, LABEL_IDS, NUM_LABEL_IDS
from segtrain.data.datasets.layout import all_below
from segtrain.data.labels import Labels
from segtrain.data.reading import FORMATS, opened, read_image, upright_size
from segtrain.errors import UserError
from segtrain.evaluation.cityscapes_official import pixel_scores
from segtrain.files import replacing, write_bytes
from segtrain.inference import Inferencer

PNG_END = "_labelIds.png"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # of every archived file: the same pictures give the same archive
_MOST_BYTES = 64 << 20  # of a PNG; an archive can promise any size
_SHOWN = 8  # values named in a violation


def key_of(image: Path) -> str:
    """What the server knows an image by.

    Args:
        image: `<city>_<sequence>_<frame>_leftImg8bit.png`.

    Returns:
        `<city>_<sequence>_<frame>`.

    Raises:
        UserError: If the file is not named so.
    """
    stem = image.name.removesuffix(IMAGE_END)
    parts = stem.rsplit("_", 2)
    numbered = len(parts) == 3 and all(part.isdecimal() for part in parts[1:])
    if stem == image.name or not numbered or not parts[0]:
        raise UserError(
            f"{image.name} is not named <city>_<sequence>_<frame>{IMAGE_END}; the server knows "
            "images by this name, keep that of the download"
        )
    return stem


def to_label_ids(labels: Labels) -> Labels:
    """Train ids to the label ids of the server.

    Args:
        labels: uint8 [H, W], 0..18.

    Returns:
        uint8 [H, W].

    Raises:
        UserError: If there is another value.
    """
    if labels.size and labels.max() >= len(LABEL_IDS):
        raise UserError(
            f"expected train ids 0..{len(LABEL_IDS) - 1}, got {labels.max()}; predict with a model "
            "of the 19 classes of Cityscapes"
        )
    return np.asarray(LABEL_IDS, np.uint8)[labels]


def png_bytes(picture: np.ndarray) -> bytes:
    """A picture as PNG.

    Args:
        picture: uint8 [H, W] or RGB [H, W, 3].

    Returns:
        Content of the file.
    """
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def write_label_ids(
    inferencer: Inferencer,
    samples: Iterable[Sample],
    folder: Path,
    *,
    progress: Callable[[], None] | None = None,
) -> dict[str, Path]:
    """Predict images and write a PNG for each.

    Args:
        inferencer: Of the 19 classes.
        samples: With the names of the download.
        folder: Exists.
        progress: Called after each image.

    Returns:
        `<city>_<sequence>_<frame>` -> its PNG.

    Raises:
        UserError: If an image cannot be read or has another name.
    """
    written = {}
    for sample in samples:
        key = key_of(sample.image)
        written[key] = folder / f"{key}{PNG_END}"
        labels = inferencer.labels(read_image(sample.image))
        write_bytes(written[key], png_bytes(to_label_ids(labels)))
        if progress is not None:
            progress()
    return written


def write_archive(pictures: Mapping[str, Path], path: Path) -> None:
    """Pack the PNGs, without folders; PNGs are compressed already.

    Args:
        pictures: Key -> file.
        path: The archive.
    """
    with replacing(path) as unfinished, zipfile.ZipFile(unfinished, "w") as archive:
        for picture in sorted(pictures.values(), key=lambda p: p.name):
            entry = zipfile.ZipInfo(picture.name, date_time=_EPOCH)
            archive.writestr(entry, picture.read_bytes())


@dataclass(frozen=True)
class _Entry:
    """A file of a folder or an archive, and its size before it is read."""

    name: str
    size: int
    read: Callable[[], bytes]


def violations(results: Path, images: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    """Everything the server would refuse.

    Args:
        results: Folder or zip archive.
        images: Key of every image of the split -> (height, width).

    Yields:
        One line for each violation.

    Raises:
        UserError: If there is no such folder or archive.
    """
    with _entries(results) as entries:
        for entry in entries:
            yield from (f"{entry.name!r}: {p}" for p in _name_problems(entry.name))
        pngs = [e for e in entries if PurePosixPath(e.name).suffix == ".png"]
        for entry in entries:
            if entry not in pngs:
                yield f"{entry.name}: only .png files belong into the results"
        claimed = set()
        for key, size in images.items():
            mine = [e for e in pngs if PurePosixPath(e.name).name.startswith(key)]
            claimed.update(e.name for e in mine)
            if not mine:
                yield f"{key}: no file starts with this name"
            if len(mine) > 1:
                yield f"{key}: {len(mine)} files start with this name, expected one"
            for entry in mine:
                yield from (f"{entry.name}: {p}" for p in _problems(entry, size))
        for entry in pngs:
            if entry.name not in claimed:
                yield f"{entry.name}: belongs to no image of the split"


def _name_problems(name: str) -> Iterator[str]:
    """What is wrong with a name, wherever the archive is unpacked."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in "".join(path.parts[:1]):
        yield "this name leads out of the folder it is unpacked into; write the bare file name"


def _problems(entry: _Entry, size: tuple[int, int]) -> Iterator[str]:
    """What is wrong with one PNG."""
    if entry.size > _MOST_BYTES:
        yield f"{entry.size} bytes are too many for a PNG of {size[1]}x{size[0]} pixels"
        return
    try:
        with Image.open(io.BytesIO(entry.read()), formats=FORMATS) as picture:
            kind, mode, found = picture.format, picture.mode, (picture.height, picture.width)
            # Others may be of any size, and are wrong already.
            pixels = np.array(picture) if found == size else None
    except Exception as error:  # a damaged file raises whatever its decoder likes
        yield f"cannot be read ({type(error).__name__})"
        return
    if kind != "PNG" or mode != "L":
        yield f"expected an 8-bit PNG of one channel, got {kind} of mode {mode}"
    if found != size:
        yield f"{found[1]}x{found[0]} pixels, expected {size[1]}x{size[0]}"
    if kind == "PNG" and mode == "L" and pixels is not None:
        yield from _value_problems(np.unique(pixels))


def _value_problems(values: np.ndarray) -> Iterator[str]:
    beyond = [v for v in values.tolist() if v >= NUM_LABEL_IDS]
    if beyond:
        yield f"values {beyond[:_SHOWN]} are no label ids, expected 0..{NUM_LABEL_IDS - 1}"
    unscored = [v for v in values.tolist() if v < NUM_LABEL_IDS and v not in LABEL_IDS]
    if unscored:
        yield (
            f"values {unscored[:_SHOWN]} are no evaluated classes; these look like train ids, "
            "write label ids (road 7, not 0)"
        )


@contextmanager
def _entries(results: Path) -> Iterator[list[_Entry]]:
    """The files of a folder or of a zip archive, hidden ones left out."""
    if results.is_dir():
        paths = sorted(p for p in all_below(results) if p.is_file())
        yield _visible(
            _Entry(p.relative_to(results).as_posix(), p.stat().st_size, p.read_bytes) for p in paths
        )
        return
    try:
        archive = zipfile.ZipFile(results)
    except (NotImplementedError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{results} is neither a folder nor a zip archive; name what submit wrote"
        ) from error
    with archive:
        files = [f for f in archive.infolist() if not f.filename.endswith("/")]
        files.sort(key=lambda f: f.filename)
        yield _visible(_Entry(f.filename, f.file_size, partial(archive.read, f)) for f in files)


def _visible(entries: Iterable[_Entry]) -> list[_Entry]:
    # Windows takes a backslash for the end of a folder.
    return [e for e in entries if not PurePosixPath(e.name.replace("\\", "/")).name.startswith(".")]


def image_sizes(samples: Iterable[Sample]) -> dict[str, tuple[int, int]]:
    """What `violations` compares with; only the heads of the files are read.

    Args:
        samples: Of the split.

    Returns:
        Key -> (height, width).

    Raises:
        UserError: If an image cannot be read or has another name.
    """
    sizes = {}
    for sample in samples:
        with opened(sample.image) as picture:
            width, height = upright_size(picture, decode=False)
            sizes[key_of(sample.image)] = (height, width)
    return sizes


def official_scores(samples: Iterable[Sample], pictures: Mapping[str, Path]) -> dict | None:
    """Score the written files by cityscapesScripts, where the split has ground truth.

    Args:
        samples: Of the split.
        pictures: Key -> PNG.

    Returns:
        As `pixel_scores`; None where there is no ground truth. That of the test split exists as
        files without a class.

    Raises:
        UserError: If cityscapesScripts refuses a file.
    """
    pairs = {s.label: pictures[key_of(s.image)] for s in samples if s.label is not None}
    if not pairs or not all(truth.is_file() for truth in pairs):
        return None
    found = pixel_scores(pairs)
    return None if isnan(found["averageScoreClasses"]) else found
