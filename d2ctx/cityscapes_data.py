"""Cityscapes in its own layout from YAML alone: `DATASETS.CITYSCAPES`.

    DATASETS:
      CITYSCAPES:
        cityscapes_val: {ROOT: "cityscapes", SPLIT: "val"}

Images are `ROOT/leftImg8bit/SPLIT/<city>/*_leftImg8bit.png`, ground truth
`ROOT/gtFine/SPLIT/<city>/*_gtFine_instanceIds.png`. The official converter makes COCO's panoptic
format of it, into the user's cache; from there on it is a data set of `DATASETS.COCO_PANOPTIC`.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ctx.datasets import resolve_path
from d2ctx.errors import UserError
from d2ctx.evaluation.cityscapes_official import convert_panoptic
from d2ctx.evaluation.panoptic_files import read_json
from d2ctx.files import user_cache, write_text
from d2ctx.panoptic_convert import PanopticDefinition, file_state
from d2ctx.panoptic_data import is_registered, load_panoptic, register_panoptic
from d2ctx.wording import did_you_mean, first_of, plural

logger = logging.getLogger(__name__)

SECTION = "CITYSCAPES"
EXAMPLE = '{ROOT: "cityscapes", SPLIT: "val"}'
SPLITS = ("train", "val", "test")
EVALUATOR = "cityscapes"
TRUTH = "_gtFine_instanceIds.png"
IMAGE = "_leftImg8bit.png"


@dataclass(frozen=True)
class CityscapesDefinition:
    """Where one split lies.

    Attributes:
        root: The folder of leftImg8bit and gtFine.
        split: "train", "val" or "test".
    """

    root: str
    split: str

    @property
    def image_root(self) -> Path:
        """Folder of the cities' images."""
        return Path(self.root, "leftImg8bit", self.split)

    @property
    def truth_root(self) -> Path:
        """Folder of the cities' ground truth."""
        return Path(self.root, "gtFine", self.split)

    @property
    def folder(self) -> Path:
        """Where the converted ground truth is kept."""
        place = f"{os.path.abspath(self.root)}\n{self.split}"
        digest = hashlib.sha256(place.encode()).hexdigest()[:16]
        return user_cache() / "d2ctx" / f"cityscapes-v1-{digest}"

    @property
    def panoptic(self) -> PanopticDefinition:
        """The converted ground truth."""
        return PanopticDefinition(
            json_file=str(self.folder / "panoptic.json"),
            png_root=str(self.folder / f"cityscapes_panoptic_{self.split}"),
            image_root=str(self.image_root),
        )

    def truths(self) -> dict[str, Path]:
        """Image id `<city>_<sequence>_<frame>` -> its `*_instanceIds.png`."""
        files = sorted(self.truth_root.glob(f"*/*{TRUTH}"))
        return {path.name.removesuffix(TRUTH): path for path in files}


def parse_cityscapes(name: str, entry: Any) -> CityscapesDefinition:
    """Read one entry of `DATASETS.CITYSCAPES`.

    Args:
        name: The data set's name.
        entry: Its value in the configuration.

    Returns:
        The definition, with a resolved path.

    Raises:
        UserError: On missing or unknown keys or an unknown split.
    """
    where = f"DATASETS.{SECTION}.{name}"
    if not isinstance(entry, Mapping) or set(entry) != {"ROOT", "SPLIT"}:
        raise UserError(f"{where} must be a section such as {EXAMPLE}, got {entry!r}")
    root, split = entry["ROOT"], entry["SPLIT"]
    if not isinstance(root, str) or not root:
        raise UserError(f'{where}.ROOT must be a path, got {root!r}; write ROOT: "..."')
    if split not in SPLITS:
        raise UserError(f"{where}.SPLIT is {split!r}; {did_you_mean(str(split), SPLITS)}")
    return CityscapesDefinition(root=resolve_path(root), split=split)


def register_cityscapes(cfg: CfgNode) -> None:
    """Register every data set of `DATASETS.CITYSCAPES`; the same definition twice is harmless.

    Args:
        cfg: A configuration with our nodes, see `d2ctx.add_d2ctx_config`.

    Raises:
        UserError: On an invalid definition, or a name taken by another data set.
    """
    for name, entry in cfg.DATASETS[SECTION].items():
        definition = parse_cityscapes(name, entry)
        if not is_registered(name, definition, section=SECTION):
            _register(name, definition)


def _register(name: str, definition: CityscapesDefinition) -> None:
    def load() -> list[dict[str, Any]]:
        convert_cityscapes(definition)
        return load_panoptic(name, definition.panoptic)

    register_panoptic(
        name,
        definition.panoptic,
        load=load,
        definition=definition,
        evaluator_type=EVALUATOR,
        gt_dir=str(definition.truth_root),
        split=definition.split,
    )


def convert_cityscapes(definition: CityscapesDefinition) -> None:
    """Convert the ground truth with the official code, unless that was done and is still true.

    Args:
        definition: The split.

    Raises:
        UserError: If files are missing, or cityscapesScripts is.
    """
    truths = definition.truths()
    states = {str(path): file_state(path) for path in truths.values()}
    remembered = definition.folder / "sources.json"
    if remembered.is_file() and json.loads(remembered.read_bytes()) == states:
        return
    images = _image_names(definition, truths)
    logger.info("Converting %d images of %s, once", len(truths), definition.truth_root)
    parent = definition.folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    made = Path(mkdtemp(dir=parent, prefix="cityscapes-partial-"))
    try:
        convert_panoptic(Path(definition.root, "gtFine"), made, split=definition.split)
        _name_images(made, definition, images)
        write_text(made / "sources.json", json.dumps(states))
        shutil.rmtree(definition.folder, ignore_errors=True)
        os.replace(made, definition.folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _image_names(definition: CityscapesDefinition, truths: Mapping[str, Path]) -> dict[str, str]:
    """Image id -> file name below the folder of the images."""
    if not truths:
        raise UserError(
            f"{definition.truth_root} holds no <city>/*{TRUTH}; unpack gtFine_trainvaltest.zip "
            "there, and set ROOT to the folder that holds gtFine and leftImg8bit"
        )
    names = {key: f"{path.parent.name}/{key}{IMAGE}" for key, path in truths.items()}
    absent = [name for name in names.values() if not (definition.image_root / name).is_file()]
    if absent:
        raise UserError(
            f"{plural(len(absent), 'image')} of {len(names)} absent below "
            f"{definition.image_root} ({first_of(absent)}); unpack leftImg8bit_trainvaltest.zip"
        )
    return names


def _name_images(made: Path, definition: CityscapesDefinition, names: Mapping[str, str]) -> None:
    """Give the images their names: the converter writes names that no file has."""
    content = read_json(made / f"cityscapes_panoptic_{definition.split}.json")
    for image in content["images"]:
        image["file_name"] = names[image["id"]]
    write_text(made / "panoptic.json", json.dumps(content))


def cityscapes_definition(name: str) -> CityscapesDefinition | None:
    """The definition of a registered data set of `DATASETS.CITYSCAPES`; None for others."""
    found = MetadataCatalog.get(name).get("definition") if name in DatasetCatalog else None
    return found if isinstance(found, CityscapesDefinition) else None
