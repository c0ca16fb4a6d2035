"""Panoptic ground truth as Panoptic FPN learns it: stuff maps, and instances in COCO's format.

Stuff maps hold 0 for things, 1..S for stuff in the order of the category ids, 255 for void.
Both are made once and kept in the user's cache, never in the data set; what has changed since is
made again.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from pycocotools import mask as coco_mask

from d2ctx.errors import UserError
from d2ctx.evaluation.panoptic_files import WORKERS, BadPngError, read_ids, read_json, write_png
from d2ctx.evaluation.panoptic_quality import disagreement
from d2ctx.files import user_cache, write_text
from d2ctx.panoptic_json import IGNORED, json_problems
from d2ctx.wording import first_of

MANIFEST = "converted.json"

# Kind of problem with a PNG -> what is said, and the fix.
_PROBLEMS = {
    "unreadable": ("of the PNGs cannot be used", "write them as 8-bit RGB PNGs"),
    "size": ("of the PNGs have another size than the image", "write them at the image's size"),
    "segments": (
        "of the PNGs disagree with the json",
        "write the json and the PNGs from the same segments",
    ),
    "area": (
        "of the PNGs hold a segment with another area than the json says",
        "write area as the number of pixels",
    ),
}


@dataclass(frozen=True)
class PanopticDefinition:
    """Where one data set in COCO's panoptic format lies.

    Attributes:
        json_file: Panoptic json.
        png_root: Folder of its PNGs.
        image_root: Folder that the json's image names start from.
        instances_json: Instances in COCO's instance format; "" takes the PNGs' thing segments.
    """

    json_file: str
    png_root: str
    image_root: str
    instances_json: str = ""

    @property
    def folder(self) -> Path:
        """Where the conversion is kept."""
        paths = [os.path.abspath(path) for path in (self.json_file, self.png_root)]
        digest = hashlib.sha256("\n".join(paths).encode()).hexdigest()[:16]
        return user_cache() / "d2ctx" / f"panoptic-v1-{digest}"

    @property
    def stuff_root(self) -> Path:
        """Folder of the stuff maps."""
        return self.folder / "stuff"

    @property
    def things_json(self) -> str:
        """Instances in COCO's format."""
        return self.instances_json or str(self.folder / "instances.json")

    def stuff_map(self, image_id: int | str) -> Path:
        """The stuff map of an image."""
        return self.stuff_root / f"{quote(str(image_id), safe='')}.png"


@dataclass(frozen=True)
class Classes:
    """The categories of a panoptic json, numbered for a model.

    Attributes:
        things: Category ids of things, in their order; contiguous classes 0..T-1.
        stuff: Category ids of stuff, in their order; contiguous classes 1..S.
        thing_names: Names of the things.
        stuff_names: Names of the stuff.
        colors: Category id -> RGB, for the categories that have one.
    """

    things: list[int]
    stuff: list[int]
    thing_names: list[str]
    stuff_names: list[str]
    colors: dict[int, list[int]]

    @classmethod
    def of(cls, categories: Sequence[Mapping[str, Any]]) -> "Classes":
        """Number the list "categories" of a json."""
        ordered = sorted(categories, key=lambda category: category["id"])
        kinds = [[c for c in ordered if bool(c["isthing"]) == thing] for thing in (True, False)]
        ids = [[c["id"] for c in kind] for kind in kinds]
        names = [[c["name"] for c in kind] for kind in kinds]
        colors = {c["id"]: list(c["color"]) for c in ordered if c.get("color")}
        return cls(*ids, *names, colors)

    def label_of(self) -> dict[int, int]:
        """Category id -> label in the stuff maps."""
        return dict.fromkeys(self.things, 0) | {c: k for k, c in enumerate(self.stuff, start=1)}


def convert(definition: PanopticDefinition, *, annotated: bool = True) -> dict[str, Any]:
    """Make the stuff maps and instances of a data set, unless they are there and still true.

    Args:
        definition: The data set.
        annotated: Whether annotations must be there.

    Returns:
        What is remembered of the data set: "categories", "images", "annotated" and "pngs".

    Raises:
        UserError: With everything that is wrong with the json and the PNGs, one line each.
    """
    if (known := fresh(definition)) and (known["annotated"] or not annotated):
        return known
    json_file = Path(definition.json_file)
    state = file_state(json_file)
    content = read_json(json_file)
    if problems := json_problems(content, annotated=annotated):
        raise UserError("\n".join(f"{json_file}: {problem}" for problem in problems))
    try:
        # Another run may be converting the same set: files are replaced, never taken away.
        definition.stuff_root.mkdir(parents=True, exist_ok=True)
        pngs = _convert_all(definition, content)
        manifest = {
            "json": state,
            "categories": content["categories"],
            "images": len(content["images"]),
            "annotated": "annotations" in content,
            "pngs": pngs,
        }
        write_text(definition.folder / MANIFEST, json.dumps(manifest))
    except OSError as error:
        raise UserError(
            f"the stuff maps of {json_file} cannot be kept in {definition.folder} "
            f"({error.strerror}); set the environment variable XDG_CACHE_HOME to a folder with room"
        ) from error
    return manifest


def fresh(definition: PanopticDefinition) -> dict[str, Any] | None:
    """What is remembered of a data set whose files have not changed since; None otherwise."""
    try:
        manifest = json.loads((definition.folder / MANIFEST).read_bytes())
        if manifest["json"] != file_state(Path(definition.json_file)):
            return None
        root = Path(definition.png_root)
        same = all(file_state(root / name) == state for name, state in manifest["pngs"].items())
    except (OSError, ValueError):
        return None
    return manifest if same else None


def file_state(path: Path) -> list[int]:
    """What changes when a file is written again."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


@dataclass(frozen=True)
class _Converted:
    """One image: its things in COCO's format, or the kind and the text of a problem."""

    file_name: str
    state: list[int]
    things: list[dict[str, Any]]
    problem: tuple[str, str] = ("", "")


def _convert_all(definition: PanopticDefinition, content: dict[str, Any]) -> dict[str, list[int]]:
    """Write all stuff maps and the instances; the state of each PNG."""
    images = {image["id"]: image for image in content["images"]}
    labels = Classes.of(content["categories"]).label_of()

    def one(annotation: dict[str, Any]) -> _Converted:
        return _convert(definition, annotation, images[annotation["image_id"]], labels)

    with ThreadPoolExecutor(WORKERS) as pool:
        done = list(pool.map(one, content.get("annotations", [])))
    _raise_problems(definition, done)
    instances = {
        "images": content["images"],
        "categories": [c for c in content["categories"] if c["isthing"]],
    }
    if "annotations" in content:
        things = [thing for converted in done for thing in converted.things]
        # COCO's evaluation takes id 0 for "not found".
        instances["annotations"] = [{"id": i, **t} for i, t in enumerate(things, start=1)]
    if not definition.instances_json:
        write_text(Path(definition.things_json), json.dumps(instances))
    return {converted.file_name: converted.state for converted in done}


def _convert(
    definition: PanopticDefinition,
    annotation: dict[str, Any],
    image: dict[str, Any],
    labels: Mapping[int, int],
) -> _Converted:
    name, segments = annotation["file_name"], annotation["segments_info"]
    path = Path(definition.png_root, name)
    try:
        state, ids = file_state(path) if path.is_file() else [], read_ids(path)
    except BadPngError as error:
        return _Converted(name, [], [], ("unreadable", error.reason))
    if ids.shape != (image["height"], image["width"]):
        size = f"{ids.shape[1]}x{ids.shape[0]}, not {image['width']}x{image['height']}"
        return _Converted(name, state, [], ("size", size))
    values, lengths = runs_of(ids)
    unique, inverse = np.unique(values, return_inverse=True)
    areas = np.bincount(inverse, lengths, len(unique))
    inverse = np.repeat(inverse, lengths).reshape(ids.shape)
    if found := disagreement(unique, segments, categories=frozenset(labels)):
        return _Converted(name, state, [], ("segments", found))
    row = {int(number): k for k, number in enumerate(unique)}
    for segment in segments:
        area = int(areas[row[segment["id"]]])
        if segment["area"] != area:
            text = f"segment {segment['id']}: {segment['area']}, counted {area}"
            return _Converted(name, state, [], ("area", text))
    lookup = np.full(len(unique), IGNORED, np.uint8)  # [ids of the image]
    for segment in segments:
        lookup[row[segment["id"]]] = labels[segment["category_id"]]
    write_png(definition.stuff_map(image["id"]), lookup[inverse])
    things = [s for s in segments if labels[s["category_id"]] == 0]
    return _Converted(
        name, state, [_instance(s, inverse == row[s["id"]], image["id"]) for s in things]
    )


def runs_of(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs of equal values along the rows: `np.unique` with `return_inverse` sorts only these.

    Args:
        values: [H, W] numbers.

    Returns:
        [R] values and [R] lengths: `np.repeat` of them is the flat map again.
    """
    flat = values.ravel()
    starts = np.flatnonzero(np.r_[True, flat[1:] != flat[:-1]])
    return flat[starts], np.diff(starts, append=flat.size)


def _instance(segment: dict[str, Any], mask: np.ndarray, image_id: int | str) -> dict[str, Any]:
    """A thing segment as an annotation of COCO's instance format."""
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {
        "image_id": image_id,
        "category_id": segment["category_id"],
        "iscrowd": int(segment.get("iscrowd", 0)),
        "area": segment["area"],
        "bbox": coco_mask.toBbox(rle).tolist(),
        "segmentation": {"size": [*map(int, rle["size"])], "counts": rle["counts"].decode()},
    }


def _raise_problems(definition: PanopticDefinition, done: Sequence[_Converted]) -> None:
    found: dict[str, list[str]] = defaultdict(list)
    for converted in done:
        kind, text = converted.problem
        if kind:
            found[kind].append(f"{converted.file_name}: {text}")
    lines = []
    for kind, items in found.items():
        phrase, fix = _PROBLEMS[kind]
        count = f"{len(items)} of {len(done)}"
        lines.append(f"{definition.png_root}: {count} {phrase} ({first_of(items)}); {fix}")
    if lines:
        raise UserError("\n".join(lines))
