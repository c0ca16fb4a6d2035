"""Everything that a server would refuse in a file of results, before it is sent.

Each function yields one line per violation.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import isfinite
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from d2ctx.errors import UserError
from d2ctx.evaluation.panoptic_files import BROKEN_IMAGE, WORKERS, BadPngError, read_ids
from d2ctx.evaluation.panoptic_quality import disagreement

_LARGEST = 1e300
_MOST_BITS = 60
MAX_DETECTIONS = 100  # per image: COCO's evaluation counts no more
_TASK_FIELDS = {"bbox": ("bbox",), "segm": ("segmentation",), "both": ("bbox", "segmentation")}
# Classes of Cityscapes that have instances and are evaluated.
_CITYSCAPES_LABELS = {24, 25, 26, 27, 28, 31, 32, 33}


def coco_violations(results: Any, truth: Mapping[str, Any], *, task: str) -> Iterator[str]:
    """What is wrong with a json of detections.

    Args:
        results: Content of the file.
        truth: Json of the set: images and categories.
        task: "bbox", "segm" or "both": what each result must hold.

    Yields:
        One line for each violation.
    """
    if not isinstance(results, list) or not all(isinstance(r, dict) for r in results):
        yield "the file must hold one list of objects"
        return
    images = {image["id"]: image for image in truth["images"]}
    categories = {category["id"] for category in truth["categories"]}
    for number, result in enumerate(results):
        image = images.get(_id_of(result, "image_id"))
        for problem in _result_problems(result, image, categories, _TASK_FIELDS[task]):
            yield f"result {number}: {problem}"
    counts = Counter(_id_of(result, "image_id") for result in results)
    for image_id, count in counts.items():
        if count > MAX_DETECTIONS:
            yield f"image {image_id}: {count} results, at most {MAX_DETECTIONS} are counted"


def _result_problems(
    result: Mapping[str, Any], image: Any, categories: set, fields: Sequence[str]
) -> Iterator[str]:
    if image is None:
        yield f"image_id {result.get('image_id')!r:.80} is not in the set"
    if _id_of(result, "category_id") not in categories:
        yield (
            f"category_id {result.get('category_id')!r:.80} is not in the set; write the set's own "
            "ids, not the model's numbers"
        )
    score = result.get("score")
    if not _is_number(score) or not 0 <= score <= 1:
        yield f"score {score!r:.80} is no number from 0 to 1"
    if "bbox" in fields and not _is_box(result.get("bbox")):
        yield f"bbox {result.get('bbox')!r:.80} is not [x, y, width, height]"
    if "segmentation" in fields:
        yield from _mask_problems(result.get("segmentation"), image)


def _id_of(entry: Mapping[str, Any], key: str) -> int | str | None:
    """An id, None where there is no such thing."""
    value = entry.get(key)
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def _is_number(value: Any) -> bool:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and abs(value) < _LARGEST  # false of NaN, too


def _is_box(box: Any) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(map(_is_number, box))
        and min(box[2], box[3]) >= 0
    )


def _mask_problems(mask: Any, image: Mapping[str, Any] | None) -> Iterator[str]:
    if not isinstance(mask, dict) or not isinstance(mask.get("counts"), str):
        yield "segmentation must be {size: [height, width], counts: text}"
        return
    if image is None:
        return
    size = [image["height"], image["width"]]
    if mask.get("size") != size:
        yield f"segmentation size {mask.get('size')!r:.80} is not [height, width] = {size}"
        return
    runs = run_lengths(mask["counts"])
    if runs is None or min(runs, default=0) < 0 or sum(runs) != size[0] * size[1]:
        yield f"the counts of the segmentation do not decode to {size[0]} x {size[1]} pixels"


def run_lengths(counts: str) -> list[int] | None:
    """Decode COCO's compressed run lengths without trusting them.

    Six bits per character from 48 on, of which the sixth says that more follow; each number is
    the difference to the one two before.

    Args:
        counts: The text.

    Returns:
        Lengths of the runs of 0, 1, 0, ...; None where it is no such text.
    """
    runs: list[int] = []
    value, shift = 0, 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            return None
        if shift > _MOST_BITS:  # of a run longer than any image
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:  # negative
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    return None if shift else runs


def panoptic_violations(
    results: Any, pngs: Path, truth: Mapping[str, Any], *, workers: int = WORKERS
) -> Iterator[str]:
    """What is wrong with a panoptic json and its PNGs.

    Args:
        results: Content of the json.
        pngs: Folder of the PNGs.
        truth: Json of the set: images and categories.
        workers: Threads.

    Yields:
        One line for each violation.
    """
    annotations = results.get("annotations") if isinstance(results, dict) else None
    if not isinstance(annotations, list) or not all(isinstance(a, dict) for a in annotations):
        yield 'the json must be an object with a list "annotations" of objects'
        return
    images = {image["id"]: image for image in truth["images"]}
    categories = frozenset(category["id"] for category in truth["categories"])
    counts = Counter(_id_of(annotation, "image_id") for annotation in annotations)
    yield from (f"image {i}: no entry" for i in images if i not in counts)
    yield from (f"image {i}: {n} entries" for i, n in counts.items() if n > 1)
    yield from (f"image {i!r} is not in the set" for i in counts if i not in images)

    def check(annotation: Mapping[str, Any]) -> str:
        return _panoptic_problem(annotation, pngs, images, categories)

    with ThreadPoolExecutor(workers) as pool:
        yield from filter(None, pool.map(check, annotations))
    listed = {str(annotation.get("file_name")) for annotation in annotations}
    for path in sorted(pngs.glob("*")):
        if path.name not in listed:
            yield f"{path.name}: in the folder, but not in the json"


def _panoptic_problem(
    annotation: Mapping[str, Any], pngs: Path, images: Mapping, categories: frozenset
) -> str:
    name, segments = annotation.get("file_name"), annotation.get("segments_info")
    if not isinstance(name, str) or not _are_segments(segments):
        shown = f"{annotation.get('image_id')!r:.80}"
        return f"image {shown}: no file_name, or segments without whole ids"
    if not _is_inside(pngs / name, pngs):
        return f"{name} does not lie in {pngs}"
    try:
        ids = read_ids(pngs / name)
    except BadPngError as error:
        return f"{name}: {error.reason}"
    image = images.get(_id_of(annotation, "image_id"))
    if image and ids.shape != (image["height"], image["width"]):
        expected = f"{image['width']}x{image['height']}"
        return f"{name}: {ids.shape[1]}x{ids.shape[0]} pixels, expected {expected}"
    problem = disagreement(np.unique(ids), segments, categories=categories)
    return f"{name}: {problem}" if problem else ""


def _are_segments(segments: Any) -> bool:
    return isinstance(segments, list) and all(
        isinstance(s, dict) and all(type(s.get(k)) is int for k in ("id", "category_id"))
        for s in segments
    )


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a path that somebody else wrote leads to a place in a folder."""
    try:
        # Other than `Path.resolve`, it ends on links that lead to themselves.
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    except ValueError:  # a zero byte
        return False


def cityscapes_violations(folder: Path, images: Mapping[str, Path]) -> Iterator[str]:
    """What is wrong with a folder of Cityscapes instances.

    Args:
        folder: The folder that is sent.
        images: `<city>_<sequence>_<frame>` -> the image, for every image of the split.

    Yields:
        One line for each violation.
    """
    texts = sorted(folder.rglob("*.txt"))
    for name, image in images.items():
        mine = [path for path in texts if path.name.startswith(name)]
        if len(mine) != 1:
            yield f"{name}: {len(mine)} files match {name}*.txt, expected one"
        for path in mine:
            size = _size_of(image)
            yield from _text_problems(path, folder, size)
    for path in texts:
        if not any(path.name.startswith(name) for name in images):
            yield f"{path.relative_to(folder)}: belongs to no image of the split"


def _size_of(image: Path) -> tuple[int, int]:
    try:
        with Image.open(image) as opened:
            return opened.size
    except BROKEN_IMAGE as error:
        raise UserError(f"{image} cannot be read ({error}); copy it again") from None


def _text_problems(text: Path, folder: Path, size: tuple[int, int]) -> Iterator[str]:
    shown = text.relative_to(folder)
    try:
        lines = text.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        yield f"{shown} is no text ({error})"
        return
    for number, line in enumerate(lines, start=1):
        for problem in _line_problems(line, text, folder, size):
            yield f"{shown}, line {number}: {problem}"
    for mask, count in Counter(line.split(" ")[0] for line in lines).items():
        if count > 1:
            yield f"{shown}: {count} lines name {mask}, of which the server sees the last"


def _line_problems(line: str, text: Path, folder: Path, size: tuple[int, int]) -> Iterator[str]:
    parts = line.split(" ")
    if len(parts) != 3:
        yield f"{line!r} is not: mask.png labelID confidence"
        return
    mask, label, confidence = parts
    if label not in map(str, _CITYSCAPES_LABELS):
        yield f"labelID {label} is not one of {sorted(_CITYSCAPES_LABELS)} (not the trainId)"
    try:
        finite = isfinite(float(confidence))
    except ValueError:
        finite = False
    if not finite:
        yield f"confidence {confidence} is no number"
    path = text.parent / mask
    if PurePosixPath(mask).is_absolute() or not _is_inside(path, folder):
        yield f"{mask} does not lie in {folder}"
        return
    yield from _mask_file_problems(path, mask, size)


def _mask_file_problems(path: Path, shown: str, size: tuple[int, int]) -> Iterator[str]:
    if not path.is_file():
        yield f"{shown} does not exist"
        return
    try:
        with Image.open(path) as image:
            mode, found = image.mode, image.size
            if found == size:
                image.load()
    except BROKEN_IMAGE as error:
        yield f"{shown} cannot be decoded ({error})"
        return
    if mode not in ("L", "1"):
        yield f"{shown} has mode {mode}, expected one channel"
    if found != size:
        yield f"{shown} is {found[0]}x{found[1]}, expected {size[0]}x{size[1]}"
