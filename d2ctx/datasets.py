"""COCO-format data sets from YAML alone: `DATASETS.COCO_FORMAT`.

    DATASETS:
      COCO_FORMAT:
        fruits_train: {JSON: "fruits/annotations/train.json", IMAGES: "fruits/images"}
      TRAIN: ("fruits_train",)

A definition may also name SEM_SEG, a folder of label maps: for every image a PNG of one 8-bit
channel with the same name, a class number per pixel (things and stuff), 255 where none is known.

Relative paths start at the environment variable DETECTRON2_DATASETS, by default ./datasets, as
those of Detectron2's own data sets do.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances

from d2ctx.errors import UserError
from d2ctx.wording import did_you_mean

# Key of a definition -> whether it must be there. All values are paths.
DEFINITION_KEYS = {"JSON": True, "IMAGES": True, "SEM_SEG": False}
# Larger annotation files are parsed once, when they are loaded, not also to learn class names.
EAGER_BYTES = 32 * 2**20
EXAMPLE = '{JSON: "annotations/train.json", IMAGES: "images"}'


@dataclass(frozen=True)
class CocoDefinition:
    """Where one data set lies.

    Attributes:
        json_file: Annotation file in COCO's instance format.
        image_root: Folder that the json's file names start from.
        semantic_root: Folder of the label maps; "" where there are none.
    """

    json_file: str
    image_root: str
    semantic_root: str = ""


def dataset_root() -> str:
    """The folder that relative data-set paths start from."""
    return os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))


def resolve_path(path: str) -> str:
    """Expand `~` and place a relative path below the data-set root; addresses stay as they are."""
    if "://" in path:
        return path
    return os.path.join(dataset_root(), os.path.expanduser(path))


def parse_definition(name: str, entry: Any) -> CocoDefinition:
    """Read one entry of `DATASETS.COCO_FORMAT`.

    Args:
        name: The data set's name.
        entry: Its value in the configuration.

    Returns:
        The definition, with resolved paths.

    Raises:
        UserError: On a missing or unknown key, or on a value that is not a path.
    """
    paths = parse_paths(
        f"DATASETS.COCO_FORMAT.{name}", entry, keys=DEFINITION_KEYS, example=EXAMPLE
    )
    return CocoDefinition(
        json_file=paths["JSON"],
        image_root=paths["IMAGES"],
        semantic_root=paths.get("SEM_SEG", ""),
    )


def parse_paths(
    where: str, entry: Any, *, keys: Mapping[str, bool], example: str
) -> dict[str, str]:
    """Read a section of the configuration that holds paths.

    Args:
        where: Its full name.
        entry: Its value.
        keys: Known keys, and whether each must be there.
        example: A section that would be right.

    Returns:
        Key -> resolved path, for the keys that are there.

    Raises:
        UserError: On a missing or unknown key, or on a value that is not a path.
    """
    if not isinstance(entry, Mapping):
        raise UserError(f"{where} must be a section such as {example}, got {entry!r}")
    for key in entry:
        if key not in keys:
            raise UserError(f"{where}.{key} is not known; {did_you_mean(key, keys)}")
    for key, required in keys.items():
        if required and key not in entry:
            name = where.rpartition(".")[2]
            raise UserError(f"{where}.{key} is missing; write {name}: {example}")
    for key, value in entry.items():
        if not isinstance(value, str) or not value:
            raise UserError(f'{where}.{key} must be a path, got {value!r}; write {key}: "..."')
    return {key: resolve_path(value) for key, value in entry.items()}


def register_coco_format(cfg: CfgNode) -> None:
    """Register every data set of `DATASETS.COCO_FORMAT`; the same definition twice is harmless.

    No file needs to exist yet: `d2ctx.preflight.check_run` says what is missing.

    Args:
        cfg: A configuration with our nodes, see `d2ctx.add_d2ctx_config`.

    Raises:
        UserError: On an invalid definition, or a name taken by another data set.
    """
    definitions = {
        name: parse_definition(name, entry) for name, entry in cfg.DATASETS.COCO_FORMAT.items()
    }
    for name, definition in definitions.items():
        _register(name, definition)


def _register(name: str, definition: CocoDefinition) -> None:
    if name not in DatasetCatalog:
        if definition.semantic_root:
            _register_with_maps(name, definition)
        else:
            register_coco_instances(name, {}, definition.json_file, definition.image_root)
        names = _class_names(definition.json_file)
        if names:
            MetadataCatalog.get(name).thing_classes = names
        return
    taken = MetadataCatalog.get(name)
    known = CocoDefinition(
        json_file=str(taken.get("json_file")),
        image_root=str(taken.get("image_root")),
        semantic_root=str(taken.get("sem_seg_root", "")),
    )
    if known != definition:
        raise UserError(
            f"DATASETS.COCO_FORMAT.{name}: the name is taken by the data set of "
            f"{known.json_file}; choose another name"
        )


def _register_with_maps(name: str, definition: CocoDefinition) -> None:
    """As `register_coco_instances`; every record also names its label map."""

    def load() -> list[dict[str, Any]]:
        records = load_coco_json(definition.json_file, definition.image_root, name)
        for record in records:
            image = os.path.relpath(record["file_name"], definition.image_root)
            record["sem_seg_file_name"] = label_map(definition.semantic_root, image)
        return records

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        json_file=definition.json_file,
        image_root=definition.image_root,
        sem_seg_root=definition.semantic_root,
        evaluator_type="coco",
    )


def label_map(semantic_root: str, image: str) -> str:
    """Path of an image's label map.

    Args:
        semantic_root: Folder of the maps.
        image: The image's name as the json gives it.
    """
    return os.path.join(semantic_root, os.path.splitext(image)[0] + ".png")


def _class_names(json_file: str) -> list[str]:
    """Class names as Detectron2 orders them; empty where the file is absent, large or malformed.

    Evaluators and visualisers want them before the data are loaded. What is wrong with a file is
    the preflight's to say.
    """
    path = Path(json_file)
    try:
        if path.stat().st_size > EAGER_BYTES:
            return []
        categories = json.loads(path.read_bytes())["categories"]
        return [c["name"] for c in sorted(categories, key=lambda c: c["id"])]
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError):
        return []
