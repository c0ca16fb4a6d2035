"""Checks of the image files: present, whole, and of the size that the json says."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from d2ctx.evaluation.panoptic_files import BROKEN_IMAGE
from d2ctx.preflight.cache import CheckedFiles, FileState
from d2ctx.preflight.coco_json import CocoFile
from d2ctx.preflight.findings import Findings
from d2ctx.wording import first_of, plural

_ORIENTATION = 0x0112  # EXIF tag
_ON_ITS_SIDE = (5, 6, 7, 8)
_WORKERS = 8
# After an error elsewhere, larger data sets are not decoded before it is mended.
_CHEAP = 2000


@dataclass(frozen=True)
class _Outcome:
    """What became of one image: absent, unreadable, or of some size."""

    name: str
    absent: bool = False
    unreadable: str = ""
    expected: tuple[int, int] = (0, 0)  # width, height
    size: tuple[int, int] = (0, 0)


def check_images(file: CocoFile, *, decode: bool, findings: Findings) -> None:
    """Check the image files of a data set; what was whole before is not read again.

    Args:
        file: The data set's json.
        decode: Whether to decode every image, or to read sizes only.
        findings: Takes what is wrong.
    """
    images = list(file.images.values())
    root = file.source.image_root
    if findings.errors and len(images) > _CHEAP:
        absent = [i for i in images if not os.path.isfile(os.path.join(root, i["file_name"]))]
        _report_absent(file, [image["file_name"] for image in absent], findings)
        return
    checked = CheckedFiles.of_folder(root)

    def examine(image: dict) -> _Outcome:
        return _examine(image, root=root, decode=decode, checked=checked)

    with ThreadPoolExecutor(min(_WORKERS, os.cpu_count() or 1)) as pool:
        outcomes = list(pool.map(examine, images))
    checked.save()
    _report_absent(file, [o.name for o in outcomes if o.absent], findings)
    _report_unreadable(file, [o for o in outcomes if o.unreadable], findings)
    _report_sizes(file, [o for o in outcomes if any(o.size) and o.size != o.expected], findings)


def _examine(image: dict, *, root: str, decode: bool, checked: CheckedFiles) -> _Outcome:
    name, expected = image["file_name"], (image["width"], image["height"])
    path = os.path.join(root, name)
    try:
        state = FileState.of(path)
        size = checked.size_of(name, state, decoded=decode)
        if size is None:
            size = read_size(path, decode=decode)
            checked.add(name, state, size=size, decoded=decode)
    except FileNotFoundError:
        return _Outcome(name, absent=True)
    except UnidentifiedImageError:
        return _Outcome(name, unreadable="no known image format")
    except BROKEN_IMAGE as error:
        return _Outcome(name, unreadable=str(error) or type(error).__name__)
    return _Outcome(name, expected=expected, size=size)


def read_size(path: str, *, decode: bool) -> tuple[int, int]:
    """Width and height as Detectron2 sees them, that is after the EXIF rotation.

    Args:
        path: An image file.
        decode: Whether to decode all of it.

    Returns:
        Width, height.

    Raises:
        OSError: If the file is absent, truncated or no image; decoders raise others as well, see
            `BROKEN_IMAGE`.
        ValueError: If it has more than 8 bits per channel, which Detectron2 would clip, or is
            PostScript.
    """
    if not os.path.isfile(path):  # a pipe would be waited for
        raise FileNotFoundError(path)
    with Image.open(path) as image:
        width, height = image.size
        if image.format == "EPS":
            raise ValueError("a program, which would be run to draw it")
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"mode {image.mode} has more than 8 bits per channel")
        if decode:
            # JPEG can decode at 1/8 of the size: the whole stream is read, most arithmetic saved.
            image.draft("L", (max(width // 8, 1), max(height // 8, 1)))
            image.load()
        # PNG decodes everything to look for EXIF behind the pixels.
        look = decode or image.format != "PNG" or "exif" in image.info
        turned = look and lies_on_its_side(image)
    return (height, width) if turned else (width, height)


def lies_on_its_side(image: Image.Image) -> bool:
    """Whether Detectron2 turns an image, or a label map, by a quarter, as its EXIF asks."""
    try:
        return image.getexif().get(_ORIENTATION, 1) in _ON_ITS_SIDE
    except BROKEN_IMAGE:  # Detectron2 then takes it as it is, too
        return False


def _report_absent(file: CocoFile, names: Sequence[str], findings: Findings) -> None:
    if names:
        findings.errors.append(
            f"{file.source.name}: {len(names)} of {plural(len(file.images), 'image file')} absent "
            f"below {file.source.image_root} ({first_of(names)}); {file.source.fix('IMAGES')}"
        )


def _report_unreadable(file: CocoFile, bad: Sequence[_Outcome], findings: Findings) -> None:
    if bad:
        shown = first_of([f"{outcome.name}: {outcome.unreadable}" for outcome in bad])
        findings.errors.append(
            f"{file.source.name}: {plural(len(bad), 'image file')} below "
            f"{file.source.image_root} cannot be decoded ({shown}); copy them again, or take "
            "them out of the json"
        )


def _report_sizes(file: CocoFile, bad: Sequence[_Outcome], findings: Findings) -> None:
    if not bad:
        return
    shown = [f"{o.name} is {_by(o.expected)} in the json, {_by(o.size)} in the file" for o in bad]
    turned = any(o.size == o.expected[::-1] for o in bad)
    findings.errors.append(
        f"{file.source.name}: the size of {plural(len(bad), 'image')} differs: "
        f"{first_of(shown)}{' (after EXIF rotation)' if turned else ''}; correct width and height "
        "in the json"
    )


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
