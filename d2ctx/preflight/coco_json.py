"""Reading a COCO-format json and checking that its parts refer to each other."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2ctx.preflight.findings import Findings
from d2ctx.preflight.sources import Source
from d2ctx.wording import first_of, plural


@dataclass(frozen=True)
class CocoFile:
    """A json whose images and categories are well-formed.

    Attributes:
        source: The data set that it belongs to.
        images: Image id -> entry.
        annotations: All annotations; None where the file has none, as a test set may.
        class_names: In the order of their ids, as Detectron2 numbers them.
        category_ids: The ids.
    """

    source: Source
    images: Mapping[Any, dict[str, Any]]
    annotations: list[dict[str, Any]] | None
    class_names: list[str]
    category_ids: frozenset[Any]


def read_coco(source: Source, findings: Findings) -> CocoFile | None:
    """Read a data set's json.

    Args:
        source: A data set whose files are present.
        findings: Takes what is wrong.

    Returns:
        The file, or None where it is too broken to check further.
    """
    content = _parse(source, findings)
    if content is _BROKEN:
        return None
    problems = list(_shape_problems(content, needs_annotations=source.train))
    if not problems:
        problems = [
            *_entry_problems("images", content["images"], _IMAGE_FIELDS),
            *_entry_problems("categories", content["categories"], _CATEGORY_FIELDS),
            *_entry_problems("annotations", content.get("annotations", []), _ANNOTATION_FIELDS),
        ]
    findings.errors.extend(f"{source.name}: {source.json_file}: {p}" for p in problems)
    if problems:
        return None
    ordered = sorted(content["categories"], key=lambda category: category["id"])
    return CocoFile(
        source=source,
        images={image["id"]: image for image in content["images"]},
        annotations=content.get("annotations"),
        class_names=[category["name"] for category in ordered],
        category_ids=frozenset(category["id"] for category in ordered),
    )


def _parse(source: Source, findings: Findings) -> Any:
    where = f"{source.name}: {source.json_file}"
    try:
        return json.loads(Path(source.json_file).read_bytes())
    except json.JSONDecodeError as error:
        findings.errors.append(
            f"{where} is no valid json: line {error.lineno}, column {error.colno}: {error.msg}; "
            "write or copy the file again"
        )
    except UnicodeDecodeError as error:
        findings.errors.append(f"{where} is no text: {error}; write it as UTF-8")
    except (RecursionError, ValueError) as error:  # too deep, or a number of thousands of digits
        findings.errors.append(f"{where} is no valid json: {error}; write the file again")
    except OSError as error:
        findings.errors.append(f"{where} cannot be read: {error.strerror}; {source.fix('JSON')}")
    return _BROKEN


def _shape_problems(content: Any, *, needs_annotations: bool) -> Iterable[str]:
    if not isinstance(content, dict):
        yield (
            f"expected an object with images, annotations and categories, got a "
            f"{type(content).__name__}; use COCO's instance format"
        )
        return
    for key in ("images", "annotations", "categories"):
        if key not in content and (key != "annotations" or needs_annotations):
            yield f'the list "{key}" is missing; use COCO\'s instance format'
        elif not isinstance(content.get(key, []), list):
            yield f'"{key}" must be a list, got a {type(content[key]).__name__}'
    if content.get("categories") == []:
        yield 'the list "categories" is empty; name at least one class'


_BROKEN = object()  # other than null, which is json
_LARGEST = 2**63 - 1  # numpy and COCO's evaluation hold ids in 64 bits


def _is_image_id(value: Any) -> bool:
    return isinstance(value, str) or _is_id(value)


def _is_id(value: Any) -> bool:
    return type(value) is int and abs(value) <= _LARGEST


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value <= _LARGEST


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


_IMAGE_FIELDS = {"id": _is_image_id, "file_name": _is_name, "width": _is_size, "height": _is_size}
_CATEGORY_FIELDS = {"id": _is_id, "name": _is_name}
_ANNOTATION_FIELDS = {"id": _is_id, "image_id": _is_image_id, "category_id": _is_id}


def _entry_problems(kind: str, entries: list[Any], fields: Mapping[str, Any]) -> Iterable[str]:
    if any(not isinstance(entry, dict) for entry in entries):
        yield f'"{kind}" must list objects; use COCO\'s instance format'
        return
    for field, is_valid in fields.items():
        bad = [i for i, entry in enumerate(entries) if not is_valid(entry.get(field))]
        if bad:
            shown = f"number {bad[0]} has {entries[bad[0]].get(field)!r:.80}"
            yield f'{len(bad)} of {len(entries)} {kind} have no valid "{field}" ({shown})'
            return
    counts = Counter(entry["id"] for entry in entries)
    twice = [key for key, count in counts.items() if count > 1]
    if twice:
        yield (
            f"{plural(len(twice), 'id')} in {kind} stand more than once ({first_of(twice)}); "
            "give each entry its own"
        )


def check_classes(
    files: list[CocoFile], *, key: str | None, wanted: int, findings: Findings
) -> None:
    """Check that all data sets have the same classes, and as many as the model.

    Args:
        files: The data sets of the run.
        key: Configuration key of the model's class count; None: the model has none.
        wanted: Its value.
        findings: Takes what is wrong.
    """
    for file in files:
        _check_promised(file, findings)
    first = files[0] if files else None
    for file in files[1:]:
        if file.class_names != first.class_names:
            findings.errors.append(
                f"{first.source.name} and {file.source.name} list different categories: "
                f"{_difference(first.class_names, file.class_names)}; write the same list, with "
                "the same ids, into both files"
            )
    if first and key and len(first.class_names) != wanted:
        count = len(first.class_names)
        section, _, leaf = key.removeprefix("MODEL.").rpartition(".")
        findings.errors.append(
            f"{key} is {wanted}, but {first.source.name} has "
            f"{plural(count, 'class')} ({first_of(first.class_names)}); write "
            f"MODEL: {{{section}: {{{leaf}: {count}}}}} in the YAML, or add {key} {count} to the "
            "command"
        )


def _check_promised(file: CocoFile, findings: Findings) -> None:
    promised = file.source.classes
    if promised is not None and list(promised) != file.class_names:
        findings.errors.append(
            f"{file.source.name} is registered with {len(promised)} classes, but its json "
            f"differs: {_difference(list(promised), file.class_names)}; register your own file "
            "under another name in DATASETS.COCO_FORMAT"
        )


def _difference(one: list[str], other: list[str]) -> str:
    if len(one) != len(other):
        return f"{len(one)} and {len(other)} of them"
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a != b]
    return first_of([f"{a!r} against {b!r}" for a, b in pairs])
