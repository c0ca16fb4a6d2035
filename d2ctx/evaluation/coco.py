"""Box and mask AP of a data set in COCO's instance format, and its results file."""

import json
import logging
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode, Instances
from detectron2.utils import comm
from pycocotools import mask as coco_mask
from tabulate import tabulate

from d2ctx.errors import UserError
from d2ctx.evaluation.ap_records import record_detections
from d2ctx.evaluation.coco_scores import average_precision, coco_api
from d2ctx.evaluation.panoptic_files import read_json
from d2ctx.evaluation.record_files import record_name
from d2ctx.evaluation.reporting import TaskReport, flat
from d2ctx.files import write_text

logger = logging.getLogger(__name__)

RESULTS = "coco_instances_results.json"
_HEADLINE = ("AP", "AP50", "AP75", "APs", "APm", "APl")


class CocoEvaluator(DatasetEvaluator):
    """COCO's average precision; results are written in the format of COCO's server.

    A data set without annotations is not scored: only the results are written. What was found in
    every image is kept for `python -m d2ctx.compare`.

    Args:
        dataset_name: A data set whose metadata name its `json_file`.
        folder: Where `coco_instances_results.json` goes.
        tasks: "bbox", "segm" or both.
    """

    def __init__(self, dataset_name: str, *, folder: Path, tasks: Sequence[str]):
        self.metadata = MetadataCatalog.get(dataset_name)
        self.folder = folder
        self.tasks = tuple(tasks)
        self.reports: dict[str, TaskReport] = {}
        self.reset()

    def reset(self) -> None:
        """Forget everything that was processed."""
        self.results: list[dict[str, Any]] = []
        self.reports = {}

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """Keep the detections of a batch.

        Args:
            inputs: Detectron2's dict of each image: `image_id`.
            outputs: The model's dict of each image: `instances`.
        """
        ids = self._category_ids()
        for image, output in zip(inputs, outputs, strict=True):
            detected = output["instances"].to("cpu")
            masks = "segm" in self.tasks
            self.results += coco_results(detected, image["image_id"], ids, masks=masks)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Write the results of all processes and score them; on the main process only.

        Returns:
            Task -> AP, AP50, AP75, APs, APm, APl and AP of each class, in percent.

        Raises:
            UserError: If the json cannot be read.
        """
        comm.synchronize()
        results = list(chain.from_iterable(comm.gather(self.results)))
        if not comm.is_main_process():
            return {}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / RESULTS, json.dumps(results))
        for task in self.tasks:  # of another model
            (self.folder / record_name(task)).unlink(missing_ok=True)
        truth = read_json(Path(self.metadata.json_file))
        if "annotations" not in truth:
            logger.info("No annotations: results are in %s, not scored", self.folder / RESULTS)
            return {}
        for task in self.tasks:
            self.reports[task] = self._score(truth, results, task)
            record = record_detections(truth, results, task=task, dataset=self.metadata.name)
            record.write(self.folder)
            logger.info(_table(task, self.reports[task]))
        return {t: _without_recall(flat(r, name="AP")) for t, r in self.reports.items()}

    def _score(self, truth: dict[str, Any], results: list[dict], task: str) -> TaskReport:
        api = coco_api()
        scores = average_precision(truth, results, task=task, api=api)
        notes = [] if results else ["the model detected nothing"]
        return TaskReport(
            evaluator=api.package,
            version=api.version,
            images=len(truth["images"]),
            classes=list(scores.per_class),
            values=scores.statistics,
            per_class=scores.per_class,
            notes=notes,
        )

    def _category_ids(self) -> list[int]:
        """Category id of each contiguous class, as loading the data set has set it."""
        contiguous = self.metadata.get("thing_dataset_id_to_contiguous_id")
        if contiguous is None:
            raise UserError(
                f"data set {self.metadata.name!r} was not loaded yet; call "
                "DatasetCatalog.get(name) before its evaluator processes images"
            )
        return sorted(contiguous, key=contiguous.get)


def coco_results(
    instances: Instances, image_id: int | str, category_ids: Sequence[int], *, masks: bool
) -> list[dict[str, Any]]:
    """Detections of one image in COCO's result format: plain numbers, RLE with text counts.

    Args:
        instances: Detections on the CPU, at the image's own size.
        image_id: The image.
        category_ids: Category id of each class.
        masks: Whether to add the masks.

    Returns:
        One dict per detection: image_id, category_id, bbox [x, y, w, h], score, segmentation.
    """
    boxes = instances.pred_boxes.tensor.clone()
    boxes = BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).tolist()
    columns = zip(instances.pred_classes.tolist(), boxes, instances.scores.tolist(), strict=True)
    results = [
        {"image_id": image_id, "category_id": category_ids[k], "bbox": box, "score": score}
        for k, box, score in columns
    ]
    if masks:
        for result, rle in zip(results, encode_masks(instances.pred_masks), strict=True):
            result["segmentation"] = rle
    return results


def encode_masks(masks: Iterable[Any]) -> Iterable[dict[str, Any]]:
    """Run-length masks with text counts.

    Args:
        masks: [H, W] masks, tensors or arrays.

    Yields:
        size [height, width] and counts of each.
    """
    for mask in masks:
        rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        yield {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}


def _without_recall(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if not name.startswith("AR")}


def _table(task: str, report: TaskReport) -> str:
    values = ", ".join(f"{name} {report.values[name]:.3f}" for name in _HEADLINE)
    rows = [[name, v["AP"], v["AP50"], v["AR100"]] for name, v in report.per_class.items()]
    table = tabulate(rows, ["class", "AP", "AP50", "AR100"], floatfmt=".3f", tablefmt="pipe")
    return f"{task}: {values} ({report.evaluator} {report.version})\n{table}"
