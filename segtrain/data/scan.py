"""Facts about the files of a split, one sample at a time: sizes, modes, pixels of each value."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from segtrain.data.datasets.layout import Layout, Sample
from segtrain.data.labels import pack
from segtrain.data.reading import opened, refuse_deep, upright_size
from segtrain.errors import UserError

_THREADS = 4  # decoding leaves the interpreter free
_MOST_VALUES = 4096  # a picture with more colours than this is a photograph, not a label map


@dataclass
class FileFacts:
    """What was found of one sample.

    Attributes:
        sample: The sample.
        image_size: Width and height, None where the image is unreadable.
        label_size: Width and height, None where there is no readable label.
        mode: Pillow's mode of the label, "" where there is none.
        colours: Whether `values` are packed colours rather than numbers.
        values: Value -> pixels; empty where labels were not decoded.
        problems: Why a file is missing or unreadable.
    """

    sample: Sample
    image_size: tuple[int, int] | None = None
    label_size: tuple[int, int] | None = None
    mode: str = ""
    colours: bool = False
    values: dict[int, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def scan(
    layout: Layout,
    samples: Sequence[Sample],
    *,
    decode: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[FileFacts]:
    """Look at every file of the samples.

    Args:
        layout: The data set.
        samples: Which samples.
        decode: True decodes images (so that truncated files show) and counts label values; False
            reads headers only.
        progress: Called with (done, total) after each sample.

    Returns:
        The facts, in the order of the samples.
    """
    found = []
    for facts in _in_threads(layout, samples, decode):
        found.append(facts)
        if progress is not None:
            progress(len(found), len(samples))
    return found


def count_values(picture: Image.Image, *, colours: bool) -> dict[int, int]:
    """Pixels of each value, or of each packed colour.

    Args:
        picture: A label map.
        colours: Whether to count colours.

    Returns:
        Value -> pixels, ascending.
    """
    if not colours and picture.mode in ("1", "L", "P"):
        pixels = np.asarray(picture, dtype=np.uint8)
        counts = np.bincount(pixels.ravel(), minlength=256)
        return {int(v): int(counts[v]) for v in np.flatnonzero(counts)}
    array = pack(np.asarray(picture.convert("RGB"))) if colours else np.asarray(picture)
    values, counts = np.unique(array, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _in_threads(layout: Layout, samples: Sequence[Sample], decode: bool) -> Iterator[FileFacts]:
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(lambda sample: _facts(layout, sample, decode), samples)


def _facts(layout: Layout, sample: Sample, decode: bool) -> FileFacts:
    facts = FileFacts(sample)
    try:
        facts.image_size = _image_size(sample.image, decode)
    except UserError as error:
        facts.problems.append(str(error))
    try:
        if sample.label is not None:
            _read_label(facts, sample.label, layout.encoding.colours, decode)
    except UserError as error:
        facts.problems.append(str(error))
    return facts


def _image_size(path: Path, decode: bool) -> tuple[int, int]:
    with opened(path) as picture:
        refuse_deep(picture, path)
        return upright_size(picture, decode=decode)


def _read_label(facts: FileFacts, path: Path, wants_colours: bool, decode: bool) -> None:
    with opened(path) as picture:
        facts.label_size = upright_size(picture, decode=decode)
        if picture.mode == "F":
            raise UserError(f"{path}: expected whole numbers, got mode F; write it as 8-bit PNG")
        facts.mode = picture.mode
        has_channels = len(picture.getbands()) > 1
        facts.colours = has_channels or (wants_colours and picture.mode == "P")
        if decode:
            counts = count_values(picture, colours=facts.colours)
            facts.values = dict(list(counts.items())[:_MOST_VALUES])
