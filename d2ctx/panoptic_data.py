"""Data sets in COCO's panoptic format from YAML alone: `DATASETS.COCO_PANOPTIC`.

    DATASETS:
      COCO_PANOPTIC:
        street_train: {JSON: "street/train.json", PNGS: "street/train", IMAGES: "street/images"}
      TRAIN: ("street_train",)

Panoptic FPN learns stuff maps and instances: both are made from the PNGs, see
`d2ctx.panoptic_convert`. INSTANCES_JSON gives the instances of another file, as COCO's polygons.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from d2ctx.datasets import EAGER_BYTES, parse_paths
from d2ctx.errors import UserError
from d2ctx.evaluation.panoptic_files import read_json
from d2ctx.panoptic_convert import Classes, PanopticDefinition, convert, fresh
from d2ctx.panoptic_json import IGNORED, json_problems

SECTION = "COCO_PANOPTIC"
DEFINITION_KEYS = {"JSON": True, "PNGS": True, "IMAGES": True, "INSTANCES_JSON": False}
EXAMPLE = '{JSON: "annotations/panoptic.json", PNGS: "annotations/panoptic", IMAGES: "images"}'


def parse_panoptic(name: str, entry: Any) -> PanopticDefinition:
    """Read one entry of `DATASETS.COCO_PANOPTIC`.

    Args:
        name: The data set's name.
        entry: Its value in the configuration.

    Returns:
        The definition, with resolved paths.

    Raises:
        UserError: On a missing or unknown key, or on a value that is not a path.
    """
    where = f"DATASETS.{SECTION}.{name}"
    paths = parse_paths(where, entry, keys=DEFINITION_KEYS, example=EXAMPLE)
    return PanopticDefinition(
        json_file=paths["JSON"],
        png_root=paths["PNGS"],
        image_root=paths["IMAGES"],
        instances_json=paths.get("INSTANCES_JSON", ""),
    )


def register_coco_panoptic(cfg: CfgNode) -> None:
    """Register every data set of `DATASETS.COCO_PANOPTIC`; the same definition twice is harmless.

    No file needs to exist yet: `d2ctx.preflight.check_run` says what is missing.

    Args:
        cfg: A configuration with our nodes, see `d2ctx.add_d2ctx_config`.

    Raises:
        UserError: On an invalid definition, or a name taken by another data set.
    """
    definitions = {
        name: parse_panoptic(name, entry) for name, entry in cfg.DATASETS[SECTION].items()
    }
    for name, definition in definitions.items():
        if not is_registered(name, definition, section=SECTION):
            register_panoptic(name, definition)


def is_registered(name: str, definition: Any, *, section: str) -> bool:
    """Whether a data set is registered with just this definition.

    Args:
        name: Its name.
        definition: Its definition, compared with the metadata's `definition`.
        section: The key below DATASETS that defines it.

    Raises:
        UserError: If the name is taken by another data set.
    """
    if name not in DatasetCatalog:
        return False
    if MetadataCatalog.get(name).get("definition") != definition:
        raise UserError(
            f"DATASETS.{section}.{name}: the name is taken by another data set; choose another name"
        )
    return True


def register_panoptic(
    name: str,
    data: PanopticDefinition,
    *,
    load: Callable[[], list[dict[str, Any]]] | None = None,
    **metadata: Any,
) -> None:
    """Register one data set for Detectron2's Panoptic FPN, and for models of instances alone.

    Args:
        name: A free name.
        data: Where it lies.
        load: Makes the data-set dicts; None takes `load_panoptic`.
        **metadata: Replace what the data set's metadata would hold.
    """
    DatasetCatalog.register(name, load or (lambda: load_panoptic(name, data)))
    known = {
        "definition": data,
        "evaluator_type": "coco_panoptic_seg",
        "panoptic_json": data.json_file,
        "panoptic_root": data.png_root,
        "image_root": data.image_root,
        "sem_seg_root": str(data.stuff_root),
        "json_file": data.things_json,
        "ignore_label": IGNORED,
    }
    MetadataCatalog.get(name).set(**(known | metadata))
    if categories := _known_categories(data):
        set_classes(name, categories)


def _known_categories(definition: PanopticDefinition) -> list[dict[str, Any]]:
    """Categories where reading them is cheap and the json is sound; otherwise none yet.

    Evaluators and visualisers want them before the data are loaded. What is wrong with a file is
    the preflight's to say.
    """
    if manifest := fresh(definition):
        return manifest["categories"]
    try:
        size = Path(definition.json_file).stat().st_size
        content = read_json(Path(definition.json_file)) if size <= EAGER_BYTES else None
    except (OSError, UserError):
        return []
    sound = content is not None and not json_problems(content, annotated=False)
    return content["categories"] if sound else []


def set_classes(name: str, categories: list[dict[str, Any]]) -> None:
    """Tell Detectron2 the classes: things 0..T-1; stuff 1..S, because 0 stands for all things.

    Args:
        name: A registered data set.
        categories: The list "categories" of its panoptic json.
    """
    classes = Classes.of(categories)
    meta = MetadataCatalog.get(name)
    meta.thing_classes = classes.thing_names
    meta.stuff_classes = ["things", *classes.stuff_names]
    meta.thing_dataset_id_to_contiguous_id = {c: k for k, c in enumerate(classes.things)}
    meta.stuff_dataset_id_to_contiguous_id = {c: k for k, c in enumerate(classes.stuff, start=1)}
    if len(classes.colors) == len(categories):
        meta.thing_colors = [classes.colors[c] for c in classes.things]
        meta.stuff_colors = [[0, 0, 0], *(classes.colors[c] for c in classes.stuff)]


def load_panoptic(name: str, definition: PanopticDefinition) -> list[dict[str, Any]]:
    """Detectron2's data-set dicts: instances, and the file of the stuff map.

    Args:
        name: The registered name, whose metadata get the classes.
        definition: Where the data set lies.

    Returns:
        One dict per image, those of a set without annotations without stuff maps.

    Raises:
        UserError: If the json and the PNGs are not sound.
    """
    manifest = convert(definition, annotated=False)
    set_classes(name, manifest["categories"])
    records = load_coco_json(definition.things_json, definition.image_root, name)
    if manifest["annotated"]:
        for record in records:
            record["sem_seg_file_name"] = str(definition.stuff_map(record["image_id"]))
    return records
