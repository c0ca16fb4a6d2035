"""Checks of boxes, polygons and run-length masks, one pass over the annotations."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from math import isfinite
from typing import Any

from d2ctx.evaluation.violations import run_lengths
from d2ctx.preflight.coco_json import CocoFile
from d2ctx.preflight.findings import Findings
from d2ctx.wording import first_of, plural

_FAR = 10
_LARGEST = 2**31


class Problem(Enum):
    """What can be wrong with an annotation, and the fix; without one, Detectron2 copes."""

    NO_IMAGE = ("point to an image that the file does not list", "add the image, or remove them")
    NO_CATEGORY = (
        "have a category that the file does not list",
        "add the category, or remove them",
    )
    IGNORE = (
        'carry "ignore": 1, which Detectron2 refuses',
        'write "iscrowd": 1 instead, or remove them',
    )
    NO_BOX = (
        "have no bbox of four finite numbers below 2^31",
        "write bbox as [x, y, width, height]",
    )
    NO_MASK = ("have no segmentation", "add masks, or set MODEL.MASK_ON False")
    NO_FORM = (
        "have a segmentation that is neither polygons nor a run-length mask",
        "write [[x1, y1, x2, y2, x3, y3, ...], ...]",
    )
    ODD = (
        "have a polygon with an odd count of numbers, or with something else than numbers",
        "write pairs of x and y",
    )
    NO_POLYGON = (
        "have no polygon of three points (six numbers) or more",
        "correct or remove them",
    )
    RLE_SIZE = (
        "have a run-length mask of another size than the image",
        "write size as [height, width] of the image",
    )
    RLE_FORMAT = (
        "are run-length masks, which INPUT.MASK_FORMAT polygon cannot hold",
        'set INPUT.MASK_FORMAT "bitmask"',
    )
    RLE_COUNTS = (
        "have a run-length mask whose counts do not decode to the size of the image",
        "write the counts again",
    )
    NO_CROWD = ("have an iscrowd that is neither 0 nor 1", "write one of them")
    NO_AREA = (
        "have no area or iscrowd, which the evaluation needs",
        "write both, area as a number of pixels",
    )
    ID_ZERO = ("have the id 0, which COCO's evaluation never counts as found", "")
    EMPTY_BOX = ("have an empty box, or one outside the image; Detectron2 skips them", "")
    SHORT_FIRST = (
        "begin with a polygon of fewer than three points, which COCO's evaluation takes for a box",
        "remove that polygon",
    )
    FAR_POLYGON = (
        "have a polygon that reaches more than ten image sizes beyond the image",
        "write points in pixels of the image",
    )
    SHORT_POLYGON = ("lose a polygon of fewer than three points", "")


@dataclass(frozen=True)
class Wanted:
    """What the run needs of an annotation.

    Attributes:
        masks: Whether the model learns or evaluates masks.
        polygons: Whether masks are kept as polygons (`INPUT.MASK_FORMAT polygon`).
        evaluation: Whether the data set is evaluated on.
    """

    masks: bool
    polygons: bool
    evaluation: bool


def check_annotations(file: CocoFile, wanted: Wanted, findings: Findings) -> None:
    """Check every annotation of a data set.

    Args:
        file: Its json.
        wanted: What the run needs.
        findings: Takes one line for each kind of problem, with the first annotation ids.
    """
    found: dict[Problem, list[Any]] = defaultdict(list)
    for annotation in file.annotations or []:
        for problem in _problems(annotation, file, wanted):
            found[problem].append(annotation["id"])
    for problem, ids in found.items():
        text, fix = problem.value
        share = f"{len(ids)} of {plural(len(file.annotations), 'annotation')}"
        line = f"{file.source.name}: {share} {text} (id {first_of(ids)})"
        (findings.errors if fix else findings.notes).append(f"{line}; {fix}" if fix else line)


def _problems(annotation: dict[str, Any], file: CocoFile, wanted: Wanted) -> Iterator[Problem]:
    if annotation["category_id"] not in file.category_ids:
        yield Problem.NO_CATEGORY
    if annotation.get("ignore", 0) != 0:
        yield Problem.IGNORE
    if annotation.get("iscrowd", 0) not in (0, 1):
        yield Problem.NO_CROWD
    if wanted.evaluation and not ("iscrowd" in annotation and _is_area(annotation.get("area"))):
        yield Problem.NO_AREA
    if wanted.evaluation and annotation["id"] == 0:
        yield Problem.ID_ZERO
    image = file.images.get(annotation["image_id"])
    if image is None:
        yield Problem.NO_IMAGE
        return
    yield from _box_problems(annotation.get("bbox"), image)
    if wanted.masks:
        yield from _mask_problems(annotation, image, wanted)


def _box_problems(box: Any, image: dict[str, Any]) -> Iterator[Problem]:
    if not (isinstance(box, list) and len(box) == 4 and _all_finite(box)):
        yield Problem.NO_BOX
        return
    if max(box) >= _LARGEST or min(box) <= -_LARGEST:  # torch refuses integers of over 64 bits
        yield Problem.NO_BOX
        return
    x, y, width, height = box
    outside = x >= image["width"] or y >= image["height"] or x + width <= 0 or y + height <= 0
    if width <= 0 or height <= 0 or outside:
        yield Problem.EMPTY_BOX


def _mask_problems(
    annotation: dict[str, Any], image: dict[str, Any], wanted: Wanted
) -> Iterator[Problem]:
    mask, crowd = annotation.get("segmentation"), bool(annotation.get("iscrowd"))
    if isinstance(mask, dict) and mask:
        broken = list(_run_length_problems(mask, image))
        yield from broken
        if wanted.polygons and not crowd and not broken:
            yield Problem.RLE_FORMAT
    elif isinstance(mask, list) and mask:
        yield from _polygon_problems(mask, image, wanted)
    elif mask:
        yield Problem.NO_FORM
    elif not crowd or wanted.evaluation:
        yield Problem.NO_MASK


def _run_length_problems(mask: dict[str, Any], image: dict[str, Any]) -> Iterator[Problem]:
    size, counts = mask.get("size"), mask.get("counts")
    if not isinstance(counts, list | str):
        yield Problem.NO_FORM
    elif size != [image["height"], image["width"]]:
        yield Problem.RLE_SIZE
    elif not _covers(counts, image["height"] * image["width"]):
        yield Problem.RLE_COUNTS


def _covers(counts: list[Any] | str, pixels: int) -> bool:
    """Whether run lengths stand for so many pixels; others would be read beyond their end."""
    runs = run_lengths(counts) if isinstance(counts, str) else counts
    if runs is None or any(type(run) is not int or run < 0 for run in runs):
        return False
    return sum(runs) == pixels


def _is_area(value: Any) -> bool:
    return isinstance(value, int | float) and _all_finite([value]) and value >= 0


def _polygon_problems(
    polygons: list[Any], image: dict[str, Any], wanted: Wanted
) -> Iterator[Problem]:
    if any(not isinstance(polygon, list) for polygon in polygons):
        yield Problem.NO_FORM
        return
    if any(len(polygon) % 2 or not _all_finite(polygon) for polygon in polygons):
        yield Problem.ODD
        return
    short = sum(len(polygon) < 6 for polygon in polygons)
    if short:
        yield Problem.NO_POLYGON if short == len(polygons) else Problem.SHORT_POLYGON
        if wanted.evaluation and len(polygons[0]) < 6 and short < len(polygons):
            yield Problem.SHORT_FIRST
    # Drawing walks along every edge, however long.
    most = _FAR * max(image["width"], image["height"])
    if any(
        max(polygon, default=0) > most or min(polygon, default=0) < -most for polygon in polygons
    ):
        yield Problem.FAR_POLYGON


def _all_finite(values: list[Any]) -> bool:
    """Whether all are numbers; a sum finds the odd one out at the speed of C."""
    try:
        return isfinite(sum(values))
    except (OverflowError, TypeError):
        return False
