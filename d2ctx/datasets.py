"""COCO-format data sets from YAML alone: `DATASETS.COCO_FORMAT`.

    DATASETS:
      COCO_FORMAT:
        fruits_train: {JSON: "fruits/annotations/train.json", IMAGES: "fruits/images"}
      TRAIN: ("fruits_train",)

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
from detectron2.data.datasets import register_coco_instances

from d2ctx.errors import UserError
from d2ctx.wording import did_you_mean

# Key of a definition -> whether it must be there. All values are paths.
DEFINITION_KEYS = {"JSON": True, "IMAGES": True}
# Larger annotation files are parsed once, when they are loaded, not also to learn class names.
EAGER_BYTES = 32 * 2**20
EXAMPLE = '{JSON: "annotations/train.json", IMAGES: "images"}'


@dataclass(frozen=True)
class CocoDefinition:
    """Where one data set lies.

    Attributes:
        json_file: Annotation file in COCO's instance format.
        image_root: Folder that the json's file names start from.
    """

    json_file: str
    image_root: str


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
    where = f"DATASETS.COCO_FORMAT.{name}"
    if not isinstance(entry, Mapping):
        raise UserError(f"{where} must be a section such as {EXAMPLE}, got {entry!r}")
    for key in entry:
        if key not in DEFINITION_KEYS:
            raise UserError(f"{where}.{key} is not known; {did_you_mean(key, DEFINITION_KEYS)}")
    for key, required in DEFINITION_KEYS.items():
        if required and key not in entry:
            raise UserError(f"{where}.{key} is missing; write {name}: {EXAMPLE}")
    for key, value in entry.items():
        if not isinstance(value, str) or not value:
            raise UserError(f'{where}.{key} must be a path, got {value!r}; write {key}: "..."')
    return CocoDefinition(
        json_file=resolve_path(entry["JSON"]), image_root=resolve_path(entry["IMAGES"])
    )


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
        register_coco_instances(name, {}, definition.json_file, definition.image_root)
        names = _class_names(definition.json_file)
        if names:
            MetadataCatalog.get(name).thing_classes = names
        return
    taken = MetadataCatalog.get(name)
    known = CocoDefinition(
        json_file=str(taken.get("json_file")), image_root=str(taken.get("image_root"))
    )
    if known != definition:
        raise UserError(
            f"DATASETS.COCO_FORMAT.{name}: the name is taken by the data set of "
            f"{known.json_file}; choose another name"
        )


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
    except (OSError, ValueError, KeyError, TypeError):
        return []
