"""`python -m d2ctx.visualize RUN`: input, ground truth and prediction side by side."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from detectron2.utils.visualizer import Visualizer
from PIL import Image
from pycocotools import mask as coco_mask

from d2ctx.errors import UserError, exit_code
from d2ctx.runs import run_config, run_predictions

PALETTE = [
    (230, 82, 82),
    (76, 132, 230),
    (240, 176, 48),
    (72, 176, 104),
    (166, 96, 214),
    (52, 186, 196),
    (236, 120, 176),
    (140, 140, 60),
]
GAP = 8
MIN_WIDTH = 400


def write_pictures(
    run: Path, *, dataset: str | None = None, num: int = 8, min_score: float = 0.5
) -> list[Path]:
    """Draw evenly spaced images of an evaluated run, one picture per image.

    Args:
        run: Output folder of a run.
        dataset: An evaluated data set; None takes the first of DATASETS.TEST.
        num: How many images.
        min_score: Detections below this score are not drawn, 0 to 1.

    Returns:
        The files written, under `run/pictures`.

    Raises:
        UserError: If the run holds no predictions for the data set.
    """
    cfg = run_config(run)
    dataset = dataset or _first_test_set(cfg)
    predictions = run_predictions(run, dataset)
    records, metadata = DatasetCatalog.get(dataset), MetadataCatalog.get(dataset)
    folder = run / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    chosen = np.linspace(0, len(records) - 1, min(num, len(records))).round().astype(int)
    paths = []
    for record in (records[i] for i in chosen):
        detections = [d for d in predictions.get(record["image_id"], []) if d["score"] >= min_score]
        picture = side_by_side(record, detections, metadata)
        paths.append(folder / _picture_name(record, metadata))
        Image.fromarray(picture).save(paths[-1])
    return paths


def _first_test_set(cfg: CfgNode) -> str:
    if not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty in this run; name a data set with --dataset")
    return cfg.DATASETS.TEST[0]


def _picture_name(record: dict[str, Any], metadata: Metadata) -> str:
    """A flat name that keeps images of equal name in different folders apart."""
    path = os.path.relpath(record["file_name"], metadata.get("image_root", "") or os.curdir)
    return "_".join(Path(path).with_suffix(".png").parts).replace("..", "")


def side_by_side(
    record: dict[str, Any], detections: list[dict[str, Any]], metadata: Metadata
) -> np.ndarray:
    """One row of three panels: the image, its ground truth, the detections.

    Args:
        record: Detectron2's data-set dict of the image.
        detections: Results in COCO's format, with the data set's own category ids.
        metadata: Class names.

    Returns:
        RGB picture [H, W, 3], uint8.
    """
    image = read_image(record["file_name"], format="RGB")
    truth = [_Item.of_annotation(a, image.shape[:2]) for a in record["annotations"]]
    found = [_Item.of_detection(d, metadata) for d in detections]
    panels = [_panel(image, items, metadata) for items in ([], truth, found)]
    gap = np.full((panels[0].shape[0], GAP, 3), 255, np.uint8)
    return np.concatenate([panels[0], gap, panels[1], gap, panels[2]], axis=1)


@dataclass(frozen=True)
class _Item:
    """What is drawn for one object: contiguous class, XYXY box, mask [H, W] or None, score."""

    category: int
    box: np.ndarray
    mask: np.ndarray | None
    score: float | None = None

    @classmethod
    def of_annotation(cls, annotation: dict[str, Any], size: tuple[int, int]) -> "_Item":
        box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        mask = annotation.get("segmentation")
        if isinstance(mask, list):
            mask = coco_mask.merge(coco_mask.frPyObjects(mask, *size))
        return cls(annotation["category_id"], np.asarray(box), _decoded(mask))

    @classmethod
    def of_detection(cls, detection: dict[str, Any], metadata: Metadata) -> "_Item":
        ids = metadata.get("thing_dataset_id_to_contiguous_id", {})
        category = ids.get(detection["category_id"], detection["category_id"])
        box = BoxMode.convert(detection["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
        mask = _decoded(detection.get("segmentation"))
        return cls(category, np.asarray(box), mask, detection["score"])

    def label(self, metadata: Metadata) -> str:
        name = metadata.thing_classes[self.category]
        return name if self.score is None else f"{name} {self.score:.0%}"


def _decoded(rle: dict[str, Any] | None) -> np.ndarray | None:
    return None if rle is None else coco_mask.decode(rle)


def _panel(image: np.ndarray, items: list[_Item], metadata: Metadata) -> np.ndarray:
    canvas = Visualizer(image, metadata, scale=max(1.0, MIN_WIDTH / image.shape[1]))
    colors = metadata.get("thing_colors", PALETTE)
    for item in items:
        color = np.array(colors[item.category % len(colors)]) / 255
        if item.mask is None or not item.mask.any():
            canvas.draw_box(item.box, edge_color=color)
            canvas.draw_text(item.label(metadata), item.box[:2], color=color)
        else:  # keeps holes, unlike polygons
            label = item.label(metadata)
            canvas.draw_binary_mask(item.mask, color, text=label, alpha=0.6, area_threshold=0)
    return canvas.output.get_image()


def main(argv: Sequence[str] | None = None) -> int:
    """Command-line entry; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m d2ctx.visualize",
        description="Draw input, ground truth and detections of an evaluated run side by side.",
    )
    parser.add_argument("run", type=Path, help="output folder of a training run")
    parser.add_argument("--dataset", help="default: the first of DATASETS.TEST")
    parser.add_argument("--num", type=int, default=8, help="how many images (default: %(default)s)")
    parser.add_argument("--min-score", type=float, default=0.5, help="default: %(default)s")
    args = parser.parse_args(argv)
    return exit_code(lambda: _print(args))


def _print(args: argparse.Namespace) -> None:
    if args.num < 1:
        raise UserError(f"--num must be at least 1, got {args.num}")
    paths = write_pictures(args.run, dataset=args.dataset, num=args.num, min_score=args.min_score)
    print(f"wrote {len(paths)} pictures to {paths[0].parent}")


if __name__ == "__main__":
    sys.exit(main())
