"""What must hold of a json in COCO's panoptic format before it can be trained on."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from d2ctx.wording import first_of, plural

IGNORED = 255  # label of void in the stuff maps
MAX_STUFF = IGNORED - 1  # labels are bytes: 0 is things, 1.. stuff

_FORMAT = "use COCO's panoptic format"


def json_problems(content: Any, *, annotated: bool) -> list[str]:
    """Everything that is wrong with a panoptic json by itself.

    Args:
        content: The parsed file.
        annotated: Whether annotations must be there.

    Returns:
        One phrase with its fix for each problem.
    """
    for check in (_shape, _categories, _images, _annotations, _segments):
        if problems := list(check(content, annotated=annotated)):
            return problems
    return []


def _shape(content: Any, *, annotated: bool) -> Iterator[str]:
    if not isinstance(content, dict):
        yield f"expected an object, got a {type(content).__name__}; {_FORMAT}"
        return
    for key in ("images", "categories", "annotations"):
        if key not in content and (key != "annotations" or annotated):
            yield f'the list "{key}" is missing; {_FORMAT}'
        elif not _are_objects(content.get(key, [])):
            yield f'"{key}" must be a list of objects; {_FORMAT}'


def _categories(content: Mapping[str, Any], **_: Any) -> Iterator[str]:
    categories = content["categories"]
    for category in categories:
        valid = (
            _is_whole(category.get("id")),
            isinstance(category.get("name"), str),
            category.get("isthing") in (0, 1),
        )
        if not all(valid):
            yield f"category {category!r:.200} needs an id, a name and isthing 0 or 1; {_FORMAT}"
            return
        if not _is_colour(category.get("color")):
            yield f"the color of category {category['id']} must be three bytes; {_FORMAT}"
            return
    for key, count in Counter(category["id"] for category in categories).items():
        if count > 1:
            same = [c for c in categories if c["id"] == key]
            kinds = [f"{'thing' if c['isthing'] else 'stuff'} {c['name']!r}" for c in same]
            yield f"category id {key} stands more than once ({', '.join(kinds)}); give each its own"
    things = sum(bool(category["isthing"]) for category in categories)
    if not things:
        yield "no category is a thing (isthing 1); name at least one thing"
    if len(categories) - things > MAX_STUFF:
        yield (
            f"{len(categories) - things} stuff categories are too many for a stuff map of bytes; "
            f"keep at most {MAX_STUFF}"
        )


def _images(content: Mapping[str, Any], **_: Any) -> Iterator[str]:
    images = content["images"]
    if not images:
        yield "no image is listed; list the images of the set"
        return
    for image in images:
        sizes = [image.get("width"), image.get("height")]
        sized = all(_is_whole(side) and side > 0 for side in sizes)
        named = isinstance(image.get("file_name"), str) and _is_image_id(image.get("id"))
        if not (sized and named):
            yield f"image {image!r:.200} needs an id, a file_name, a width and a height; {_FORMAT}"
            return
    # Stuff maps are files, in whose names a number is a text.
    yield from _twice("images", [str(image["id"]) for image in images])


def _annotations(content: Mapping[str, Any], *, annotated: bool) -> Iterator[str]:
    if "annotations" not in content:
        return
    annotations = content["annotations"]
    for annotation in annotations:
        named = isinstance(annotation.get("file_name"), str)
        if not named or not _are_objects(annotation.get("segments_info")):
            shown = f"{annotation.get('image_id')!r:.80}"
            yield f"the annotation of image {shown} has no file_name or segments_info; {_FORMAT}"
            return
        if not _is_image_id(annotation.get("image_id")):
            yield f"the annotation {annotation['file_name']} has no image_id; {_FORMAT}"
            return
    known = {image["id"] for image in content["images"]}
    ids = [annotation.get("image_id") for annotation in annotations]
    if strange := [i for i in ids if i not in known]:
        count = plural(len(strange), "annotation")
        yield f"{count} belong to an image that is not listed ({first_of(strange)}); list it"
    if absent := sorted(known - set(ids), key=str):
        count = plural(len(absent), "image")
        yield (
            f"{count} of {len(known)} have no panoptic annotation, hence no stuff map "
            f"({first_of(absent)}); annotate them, or take them out"
        )
    yield from _twice("annotations", ids)


def _segments(content: Mapping[str, Any], **_: Any) -> Iterator[str]:
    for annotation in content.get("annotations", []):
        for segment in annotation["segments_info"]:
            numbers = [segment.get(key) for key in ("id", "category_id", "area")]
            if not all(map(_is_whole, numbers)):
                yield (
                    f"a segment of image {annotation['image_id']} has no whole number as id, "
                    f"category_id or area: {segment!r:.200}; {_FORMAT}"
                )
                return
            if segment.get("iscrowd", 0) not in (0, 1):
                yield f"segment {segment['id']} must have an iscrowd of 0 or 1; {_FORMAT}"
                return


def _twice(kind: str, ids: list[Any]) -> Iterator[str]:
    twice = [key for key, count in Counter(ids).items() if count > 1]
    if twice:
        yield (
            f"{plural(len(twice), 'image')} in {kind} stand more than once ({first_of(twice)}); "
            "keep one of each"
        )


def _are_objects(entries: Any) -> bool:
    return isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)


def _is_whole(value: Any) -> bool:
    return type(value) is int and abs(value) < 1 << 63


def _is_image_id(value: Any) -> bool:
    return isinstance(value, str) or _is_whole(value)


def _is_colour(value: Any) -> bool:
    if not value:
        return value in (None, [])
    bytes_ = isinstance(value, list) and all(_is_whole(v) and 0 <= v <= 255 for v in value)
    return bytes_ and len(value) == 3
