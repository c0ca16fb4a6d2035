"""`python -m d2ctx.visualize RUN`: input, ground truth and prediction side by side."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.visualizer import ColorMode, Visualizer
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
    dataset = dataset or cfg.DATASETS.TEST[0]
    predictions = run_predictions(run, dataset)
    records, metadata = DatasetCatalog.get(dataset), MetadataCatalog.get(dataset)
    metadata.thing_colors = [PALETTE[i % len(PALETTE)] for i in range(len(metadata.thing_classes))]
    folder = run / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    chosen = np.linspace(0, len(records) - 1, min(num, len(records))).round().astype(int)
    paths = []
    for record in (records[i] for i in chosen):
        detections = [d for d in predictions.get(record["image_id"], []) if d["score"] >= min_score]
        picture = side_by_side(record, detections, metadata)
        paths.append(folder / f"{Path(record['file_name']).stem}.png")
        Image.fromarray(picture).save(paths[-1])
    return paths


def side_by_side(
    record: dict[str, Any], detections: list[dict[str, Any]], metadata: Metadata
) -> np.ndarray:
    """One row of three panels: the image, its ground truth, the detections.

    Args:
        record: Detectron2's data-set dict of the image.
        detections: Results in COCO's format, with the data set's own category ids.
        metadata: Class names and colours.

    Returns:
        RGB picture [H, W, 3], uint8.
    """
    image = read_image(record["file_name"], format="RGB")
    scale = max(1.0, MIN_WIDTH / image.shape[1])
    truth = _visualizer(image, metadata, scale).draw_dataset_dict(record).get_image()
    drawn = _visualizer(image, metadata, scale).draw_instance_predictions(
        _instances(detections, image.shape[:2], metadata)
    )
    panels = [_visualizer(image, metadata, scale).output.get_image(), truth, drawn.get_image()]
    gap = np.full((panels[0].shape[0], GAP, 3), 255, np.uint8)
    return np.concatenate([panels[0], gap, panels[1], gap, panels[2]], axis=1)


def _visualizer(image: np.ndarray, metadata: Metadata, scale: float) -> Visualizer:
    return Visualizer(image, metadata, scale=scale, instance_mode=ColorMode.SEGMENTATION)


def _instances(
    detections: list[dict[str, Any]], size: tuple[int, int], metadata: Metadata
) -> Instances:
    ids = metadata.get("thing_dataset_id_to_contiguous_id", {})
    instances = Instances(size)
    boxes = np.array([d["bbox"] for d in detections], np.float32).reshape(-1, 4)
    boxes = BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
    instances.pred_boxes = Boxes(torch.as_tensor(boxes))
    instances.scores = torch.tensor([d["score"] for d in detections])
    classes = [ids.get(d["category_id"], d["category_id"]) for d in detections]
    instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
    if detections and "segmentation" in detections[0]:
        masks = np.stack([coco_mask.decode(d["segmentation"]) for d in detections])
        instances.pred_masks = torch.as_tensor(masks, dtype=torch.bool)
    return instances


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
