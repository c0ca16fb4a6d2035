"""Tiny COCO-format data sets and configurations over them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from d2ctx import UserError, add_d2ctx_config, register_coco_format
from d2ctx.preflight import check_run

CLASSES = ("disc", "square", "star")


@dataclass
class ToySet:
    """A data set on disk; change `content` and call `save`."""

    name: str
    json_file: Path
    image_root: Path
    content: dict[str, Any]

    @property
    def images(self) -> list[dict[str, Any]]:
        return self.content["images"]

    @property
    def annotations(self) -> list[dict[str, Any]]:
        return self.content["annotations"]

    def save(self) -> None:
        self.json_file.write_text(json.dumps(self.content))


def write_toy(
    folder: Path, name: str = "toy_train", *, images: int = 8, size: int = 32, suffix: str = ".jpg"
) -> ToySet:
    """Noise images with one square object each; ids start at 1, classes take turns."""
    root = folder / "images"
    root.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    square = [4, 4, 20, 4, 20, 20, 4, 20]
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    for number in range(1, images + 1):
        file_name = f"{name}_{number}{suffix}"
        pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / file_name)
        content["images"].append(
            {"id": number, "file_name": file_name, "width": size, "height": size}
        )
        content["annotations"].append(
            {
                "id": number,
                "image_id": number,
                "category_id": (number - 1) % len(CLASSES) + 1,
                "bbox": [4, 4, 16, 16],
                "area": 256,
                "iscrowd": 0,
                "segmentation": [list(square)],
            }
        )
    content["categories"] = [{"id": i, "name": c} for i, c in enumerate(CLASSES, start=1)]
    toy = ToySet(name, folder / f"{name}.json", root, content)
    toy.save()
    return toy


def toy_config(*, train: list[ToySet], test: list[ToySet], output: Path) -> CfgNode:
    """A Mask R-CNN configuration for the CPU over toy data sets, which are registered."""
    cfg = get_cfg()
    add_d2ctx_config(cfg)
    for toy in (*train, *test):
        cfg.DATASETS.COCO_FORMAT[toy.name] = definition(toy)
    cfg.DATASETS.TRAIN = tuple(toy.name for toy in train)
    cfg.DATASETS.TEST = tuple(toy.name for toy in test)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(CLASSES)
    cfg.OUTPUT_DIR = str(output)
    register_coco_format(cfg)
    return cfg


def definition(toy: ToySet) -> CfgNode:
    return CfgNode({"JSON": str(toy.json_file), "IMAGES": str(toy.image_root)})


def refusal(cfg: CfgNode, **kwargs: Any) -> str:
    """What `check_run` objects to."""
    with pytest.raises(UserError) as caught:
        check_run(cfg, **{"eval_only": False, **kwargs})
    return str(caught.value)


@contextmanager
def restored_catalogs() -> Iterator[None]:
    """Forget the data sets that were registered inside."""
    catalogs = (DatasetCatalog, MetadataCatalog)
    before = [set(catalog.list()) for catalog in catalogs]
    try:
        yield
    finally:
        for catalog, names in zip(catalogs, before, strict=True):
            for name in set(catalog.list()) - names:
                catalog.remove(name)
