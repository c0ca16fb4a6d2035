"""`python -m d2ctx.visualize RUN`: input, ground truth, prediction, and what differs.

In the last panel what is right is green, what is wrong orange, and what was missed blue.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as coco_mask

from d2ctx.errors import UserError, exit_code
from d2ctx.evaluation.panoptic import NAME as PANOPTIC_FILE
from d2ctx.picture import (
    MISSED,
    PALETTE,
    RIGHT,
    WRONG,
    Drawn,
    comparison_caption,
    draw_objects,
    row,
)
from d2ctx.runs import run_config, run_predictions
from d2ctx.visualize_match import Object, compare_objects
from d2ctx.visualize_panoptic import PanopticPictures
from d2ctx.wording import plural

TASKS = ("auto", "instances", "panoptic")
# A picture of an image, given its pixels and its data-set dict.
Draw = Callable[[np.ndarray, dict[str, Any]], np.ndarray]


def write_pictures(
    run: Path,
    *,
    dataset: str | None = None,
    num: int = 8,
    min_score: float = 0.5,
    task: str = "auto",
) -> list[Path]:
    """Draw evenly spaced images of an evaluated run, one picture per image and task.

    Args:
        run: Output folder of a run.
        dataset: An evaluated data set; None takes the first of DATASETS.TEST.
        num: How many images.
        min_score: Detections below this score are not drawn, 0 to 1.
        task: "instances", "panoptic", or "auto" for all that the run has.

    Returns:
        The files written: instances in `run/pictures`, panoptic ones in `run/pictures/panoptic`.

    Raises:
        UserError: If the run holds no predictions for the data set.
    """
    cfg = run_config(run)
    dataset = dataset or _first_test_set(cfg)
    drawers = _drawers(run, dataset, task, min_score)
    records, metadata = DatasetCatalog.get(dataset), MetadataCatalog.get(dataset)
    chosen = np.linspace(0, len(records) - 1, min(num, len(records))).round().astype(int)
    paths = []
    for record in (records[i] for i in chosen):
        image = read_image(record["file_name"], format="RGB")
        for folder, draw in drawers.items():
            folder.mkdir(parents=True, exist_ok=True)
            paths.append(folder / _picture_name(record, metadata))
            Image.fromarray(draw(image, record)).save(paths[-1])
    return paths


def _drawers(run: Path, dataset: str, task: str, min_score: float) -> dict[Path, Draw]:
    """Folder -> what draws its pictures, for every task that is asked for."""
    folder, drawers = run / "pictures", {}
    inference, metadata = run / "inference" / dataset, MetadataCatalog.get(dataset)
    evaluated = (inference / f"{PANOPTIC_FILE}.json").is_file()
    # Where there is nothing at all, the error speaks of instances.
    if task == "instances" or (task == "auto" and (not evaluated or _has_instances(inference))):
        predictions = run_predictions(run, dataset)

        def draw(image: np.ndarray, record: dict[str, Any]) -> np.ndarray:
            listed = predictions.get(record["image_id"], [])
            detections = [d for d in listed if d["score"] >= min_score]
            return side_by_side(image, record, detections, metadata)

        drawers[folder] = draw
    if task == "panoptic" or (task == "auto" and evaluated):
        if not evaluated:
            raise UserError(
                f"expected a run with panoptic predictions for {dataset}, but {inference} holds no "
                f"{PANOPTIC_FILE}.json; evaluate a panoptic model, or leave --task out"
            )
        pictures = PanopticPictures(inference, metadata)
        drawers[folder / "panoptic"] = lambda image, record: pictures.draw(
            image, record["image_id"]
        )
    return drawers


def _has_instances(inference: Path) -> bool:
    return (inference / "coco_instances_results.json").is_file()


def _first_test_set(cfg: CfgNode) -> str:
    if not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty in this run; name a data set with --dataset")
    return cfg.DATASETS.TEST[0]


def _picture_name(record: dict[str, Any], metadata: Metadata) -> str:
    """A flat name that keeps images of equal name in different folders apart."""
    path = os.path.relpath(record["file_name"], metadata.get("image_root", "") or os.curdir)
    return "_".join(Path(path).with_suffix(".png").parts).replace("..", "")


def side_by_side(
    image: np.ndarray,
    record: dict[str, Any],
    detections: list[dict[str, Any]],
    metadata: Metadata,
) -> np.ndarray:
    """One row of panels: the image, its ground truth, the detections, and what differs.

    Args:
        image: RGB [H, W, 3], bytes.
        record: Detectron2's data-set dict of the image; without "annotations" there are neither
            ground truth nor differences.
        detections: Results in COCO's format, with the data set's own category ids.
        metadata: Class names.

    Returns:
        RGB picture, bytes.
    """
    found = [_of_detection(d, metadata) for d in detections]

    def panel(objects: Sequence[Object]) -> np.ndarray:
        return draw_objects(image, [_in_class_color(o, metadata) for o in objects])

    panels = [("image", panel([])), ("detections", panel(found))]
    if "annotations" in record:
        truth = [_of_annotation(a, image.shape[:2]) for a in record["annotations"]]
        panels.insert(1, ("ground truth", panel(truth)))
        panels.append(_differences(image, truth, found, metadata))
    return row(panels)


def _differences(
    image: np.ndarray, truth: Sequence[Object], found: Sequence[Object], metadata: Metadata
) -> tuple[str, np.ndarray]:
    """Caption, and panel of the matched detections, the wrong ones, and the missed objects."""
    result = compare_objects(truth, found)
    groups = (
        (MISSED, [truth[i] for i in result.missed]),
        (WRONG, [found[i] for i in result.wrong]),
        (RIGHT, [found[i] for i in result.right]),
    )
    drawn = [Drawn(o.box, o.mask, color, _label(o, metadata)) for color, g in groups for o in g]
    caption = comparison_caption(
        right=len(result.right), wrong=len(result.wrong), missed=len(result.missed)
    )
    return caption, draw_objects(image, drawn)


def _of_annotation(annotation: dict[str, Any], size: tuple[int, int]) -> Object:
    box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    mask = annotation.get("segmentation")
    if isinstance(mask, list):
        mask = coco_mask.merge(coco_mask.frPyObjects(mask, *size))
    crowd = annotation.get("iscrowd", 0) == 1
    return Object(annotation["category_id"], np.asarray(box), _decoded(mask), crowd=crowd)


def _of_detection(detection: dict[str, Any], metadata: Metadata) -> Object:
    ids = metadata.get("thing_dataset_id_to_contiguous_id", {})
    category = ids.get(detection["category_id"], detection["category_id"])
    box = BoxMode.convert(detection["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
    mask = _decoded(detection.get("segmentation"))
    return Object(category, np.asarray(box), mask, detection["score"])


def _decoded(rle: dict[str, Any] | None) -> np.ndarray | None:
    return None if rle is None else coco_mask.decode(rle)


def _in_class_color(item: Object, metadata: Metadata) -> Drawn:
    colors = metadata.get("thing_colors", PALETTE)
    color = colors[item.category % len(colors)]
    return Drawn(item.box, item.mask, color, _label(item, metadata))


def _label(item: Object, metadata: Metadata) -> str:
    name = metadata.thing_classes[item.category] + (" (crowd)" if item.crowd else "")
    return name if item.score is None else f"{name} {item.score:.0%}"


def main(argv: Sequence[str] | None = None) -> int:
    """Command-line entry; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m d2ctx.visualize",
        description="Draw input, ground truth, predictions and their differences (green: right, "
        "orange: wrong, blue: missed) of an evaluated run side by side.",
    )
    parser.add_argument("run", type=Path, help="output folder of a training run")
    parser.add_argument("--dataset", help="default: the first of DATASETS.TEST")
    parser.add_argument("--num", type=int, default=8, help="how many images (default: %(default)s)")
    parser.add_argument("--min-score", type=float, default=0.5, help="default: %(default)s")
    parser.add_argument(
        "--task", choices=TASKS, default="auto", help="default: all that the run has"
    )
    args = parser.parse_args(argv)
    return exit_code(lambda: _print(args))


def _print(args: argparse.Namespace) -> None:
    if args.num < 1:
        raise UserError(f"--num must be at least 1, got {args.num}")
    paths = write_pictures(
        args.run,
        dataset=args.dataset,
        num=args.num,
        min_score=args.min_score,
        task=args.task,
    )
    for folder in dict.fromkeys(path.parent for path in paths):
        count = sum(path.parent == folder for path in paths)
        print(f"wrote {plural(count, 'picture')} to {folder}")


if __name__ == "__main__":
    sys.exit(main())
