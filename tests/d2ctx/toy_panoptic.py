"""Tiny data sets in COCO's panoptic format, and in the layout of Cityscapes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from PIL import Image

from d2ctx.evaluation.panoptic_files import write_ids
from d2ctx.registration import register_datasets

from .tiny import config

# Sparse ids, things and stuff mixed.
CATEGORIES = [
    {"id": 4, "name": "sky", "isthing": 0, "color": [0, 0, 200]},
    {"id": 7, "name": "disc", "isthing": 1, "color": [200, 0, 0]},
    {"id": 9, "name": "ground", "isthing": 0, "color": [0, 200, 0]},
    {"id": 12, "name": "star", "isthing": 1, "color": [200, 200, 0]},
]
# Segment ids of more than one byte, by category.
IDS = {4: 300, 7: 70000, 9: 2, 12: 9_000_000}
HEIGHT, WIDTH = 32, 48


@dataclass
class ToyPanoptic:
    """A data set on disk; change `content` and call `save`."""

    name: str
    json_file: Path
    png_root: Path
    image_root: Path
    content: dict[str, Any]

    def save(self) -> None:
        self.json_file.write_text(json.dumps(self.content))

    def png(self, number: int) -> Path:
        return self.png_root / f"{self.name}_{number}.png"

    def entry(self, **more: str) -> dict[str, str]:
        """Its section below DATASETS.COCO_PANOPTIC."""
        paths = {"JSON": self.json_file, "PNGS": self.png_root, "IMAGES": self.image_root}
        return {key: str(path) for key, path in paths.items()} | more


def panoptic_ids() -> np.ndarray:
    """Sky above, ground below, a disc (crowd) and a star, and void at the left."""
    ids = np.full((HEIGHT, WIDTH), IDS[9])
    ids[:16] = IDS[4]
    ids[4:12, 8:24] = IDS[7]
    ids[18:30, 20:40] = IDS[12]
    ids[:, :2] = 0
    return ids


def segments_of(ids: np.ndarray, *, crowd: int = IDS[7]) -> list[dict[str, Any]]:
    """The `segments_info` of a map of the ids above."""
    return [
        {
            "id": number,
            "category_id": category,
            "area": int((ids == number).sum()),
            "iscrowd": int(number == crowd),
        }
        for category, number in IDS.items()
        if (ids == number).any()
    ]


def write_panoptic(folder: Path, name: str = "toy_panoptic", *, images: int = 2) -> ToyPanoptic:
    """Noise images that all have the same segments; image ids 1 ..."""
    toy = ToyPanoptic(name, folder / f"{name}.json", folder / name, folder / "images", {})
    toy.png_root.mkdir(parents=True)
    toy.image_root.mkdir(exist_ok=True)
    generator, ids = np.random.default_rng(0), panoptic_ids()
    toy.content = {"images": [], "annotations": [], "categories": [dict(c) for c in CATEGORIES]}
    for number in range(1, images + 1):
        file_name = f"{name}_{number}.jpg"
        pixels = generator.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(toy.image_root / file_name)
        write_ids(toy.png(number), ids)
        size = {"width": WIDTH, "height": HEIGHT}
        toy.content["images"].append({"id": number, "file_name": file_name, **size})
        toy.content["annotations"].append(
            {
                "image_id": number,
                "file_name": toy.png(number).name,
                "segments_info": segments_of(ids),
            }
        )
    toy.save()
    return toy


def panoptic_config(
    *, train: list[str], test: list[str], output: Path, things: int = 2, stuff: int = 2, **sections
) -> CfgNode:
    """A tiny Panoptic FPN with A²-FPN on the CPU; `sections` are those below DATASETS."""
    cfg = config(
        *("a2fpn/mask_rcnn_a2fpn_instant.yaml", "MODEL.META_ARCHITECTURE", "ContextPanopticFPN"),
        *("MODEL.ROI_HEADS.NUM_CLASSES", things, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", stuff + 1),
        *("MODEL.SEM_SEG_HEAD.CONVS_DIM", 32, "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT", 16),
        *("MODEL.RPN.POST_NMS_TOPK_TEST", 20, "INPUT.MASK_FORMAT", "bitmask"),
        *("INPUT.MIN_SIZE_TRAIN", [32], "INPUT.MIN_SIZE_TEST", 32, "OUTPUT_DIR", str(output)),
        *("SOLVER.MAX_ITER", 3, "SOLVER.STEPS", [2], "DATALOADER.NUM_WORKERS", 0),
    )
    for section, entries in sections.items():
        cfg.DATASETS[section] = CfgNode(entries, new_allowed=True)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(train), tuple(test)
    register_datasets(cfg)
    return cfg


def write_cityscapes(root: Path, *, split: str = "val", images: int = 1) -> list[str]:
    """Frames with a road, a sky, a person, a car and a group of cars; returns their names."""
    names = []
    ids = np.full((HEIGHT, WIDTH), 7, np.uint16)
    ids[:8] = 23
    ids[10:26, 4:14] = 24000
    ids[10:26, 18:34] = 26000
    ids[10:26, 36:46] = 26  # cars that nobody told apart
    ids[:, :2] = 0
    labels = np.where(ids < 1000, ids, ids // 1000).astype(np.uint8)
    for number in range(images):
        name = f"toy_{number:06d}_000019"
        for kind, city in (("leftImg8bit", "toy"), ("gtFine", "toy")):
            (root / kind / split / city).mkdir(parents=True, exist_ok=True)
        image = np.random.default_rng(number).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(image).save(root / f"leftImg8bit/{split}/toy/{name}_leftImg8bit.png")
        truth = root / f"gtFine/{split}/toy/{name}_gtFine_"
        Image.fromarray(ids).save(f"{truth}instanceIds.png")
        Image.fromarray(labels).save(f"{truth}labelIds.png")
        names.append(name)
    return names
