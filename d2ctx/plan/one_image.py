"""Data sets of one image, cut from those of `DATASETS.TEST`, so that real evaluators can be tried.

Their annotations are written below the rehearsal's folder; pictures stay where they are.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ctx.cityscapes_data import EVALUATOR, IMAGE, CityscapesDefinition
from d2ctx.errors import UserError
from d2ctx.evaluation.panoptic_files import read_json
from d2ctx.registration import register_datasets

_CACHE = "XDG_CACHE_HOME"


@dataclass(frozen=True)
class OneImage:
    """A data set of one image.

    Attributes:
        name: As registered.
        of: The data set that it is cut from.
        images: Of that one.
    """

    name: str
    of: str
    images: int


@contextmanager
def one_image_sets(cfg: CfgNode, names: Sequence[str], folder: Path) -> Iterator[list[OneImage]]:
    """Register a data set of one image for each test set, as long as the body runs.

    Args:
        cfg: Defrosted; gets the definitions.
        names: Of the test sets.
        folder: For their annotations, and for the cache of what is made of them.

    Yields:
        The data sets.

    Raises:
        UserError: If a data set has no image, or lies where none can be cut out.
    """
    before, cache = set(DatasetCatalog.list()), os.environ.get(_CACHE)
    os.environ[_CACHE] = str(folder / "cache")
    try:
        sets = [_cut(cfg, name, folder / f"set{n}") for n, name in enumerate(names)]
        register_datasets(cfg)
        yield sets
    finally:
        if cache is None:
            del os.environ[_CACHE]
        else:
            os.environ[_CACHE] = cache
        for name in set(DatasetCatalog.list()) - before:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def _cut(cfg: CfgNode, name: str, place: Path) -> OneImage:
    place.mkdir(parents=True)
    meta, one = MetadataCatalog.get(name), f"{name}_first_image"
    kind = meta.get("evaluator_type")
    if kind == EVALUATOR:
        section, entry, images = "CITYSCAPES", *_cityscapes(meta.definition, place)
    elif kind == "coco_panoptic_seg":
        section, entry, images = "COCO_PANOPTIC", *_panoptic(meta, place)
    else:
        section = "COCO_FORMAT"
        json_file, images, _ = _first_of(Path(meta.json_file), place / "instances.json")
        entry = {"JSON": json_file, "IMAGES": os.path.abspath(meta.image_root)}
    cfg.DATASETS[section][one] = CfgNode(entry)
    return OneImage(one, name, images)


def _first_of(
    json_file: Path, target: Path, *, image_id: Any = None
) -> tuple[str, int, dict[str, Any]]:
    """Write a json of one image, the first annotated one; its path, how many there were, it."""
    content = read_json(json_file)
    if not content["images"]:
        raise UserError(f"{json_file} lists no image; take another data set for DATASETS.TEST")
    images = {image["id"]: image for image in content["images"]}
    annotated = (a["image_id"] for a in content.get("annotations", []) if a["image_id"] in images)
    if image_id is None:
        image_id = next(annotated, next(iter(images)))
    cut = {**content, "images": [images[image_id]]}
    if "annotations" in content:
        cut["annotations"] = [a for a in content["annotations"] if a["image_id"] == image_id]
    target.write_text(json.dumps(cut))
    return str(target.absolute()), len(images), images[image_id]


def _panoptic(meta: Any, place: Path) -> tuple[dict[str, str], int]:
    json_file, images, image = _first_of(Path(meta.panoptic_json), place / "panoptic.json")
    entry = {
        "JSON": json_file,
        "PNGS": os.path.abspath(meta.panoptic_root),
        "IMAGES": os.path.abspath(meta.image_root),
    }
    definition = meta.get("definition")
    instances = definition.instances_json if definition else meta.json_file
    if instances:
        target = place / "instances.json"
        entry["INSTANCES_JSON"] = _first_of(Path(instances), target, image_id=image["id"])[0]
    return entry, images


def _cityscapes(definition: CityscapesDefinition, place: Path) -> tuple[dict[str, str], int]:
    """Links to the files of the first frame, in the same layout."""
    frames = sorted(definition.image_root.glob(f"*/*{IMAGE}"))
    if not frames:
        raise UserError(
            f"{definition.image_root} holds no <city>/*{IMAGE}; mend DATASETS.CITYSCAPES"
        )
    city, frame = frames[0].parent.name, frames[0].name.removesuffix(IMAGE)
    truths = (definition.truth_root / city).glob(f"{frame}_*")
    for kind, files in (("leftImg8bit", [frames[0]]), ("gtFine", truths)):
        folder = place / kind / definition.split / city
        folder.mkdir(parents=True)
        for path in files:
            (folder / path.name).symlink_to(path.absolute())
    return {"ROOT": str(place.absolute()), "SPLIT": definition.split}, len(frames)


def truth_of(name: str) -> tuple[str, Mapping[str, Any]]:
    """The json that a data set's results are held against.

    Args:
        name: A registered data set.

    Returns:
        Its kind, "coco", "panoptic" or "cityscapes", and its content; of Cityscapes, image name
        -> image.
    """
    meta = MetadataCatalog.get(name)
    if meta.evaluator_type == EVALUATOR:
        frames = meta.definition.image_root.glob(f"*/*{IMAGE}")
        return "cityscapes", {path.name.removesuffix(IMAGE): path for path in frames}
    if meta.evaluator_type == "coco_panoptic_seg":
        return "panoptic", read_json(Path(meta.panoptic_json))
    return "coco", read_json(Path(meta.json_file))
