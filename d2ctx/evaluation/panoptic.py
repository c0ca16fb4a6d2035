"""Panoptic predictions written in COCO's format while they are made, and their quality."""

import json
import logging
import math
import shutil
from collections.abc import Sequence
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from PIL import Image
from tabulate import tabulate
from torch import Tensor

from d2ctx.errors import UserError
from d2ctx.evaluation import cityscapes_official
from d2ctx.evaluation.coco_scores import class_names
from d2ctx.evaluation.panoptic_files import count_images, read_json, write_ids
from d2ctx.evaluation.panoptic_quality import VOID, add_counts, summarize
from d2ctx.evaluation.pq_records import record_segments
from d2ctx.evaluation.record_files import record_name
from d2ctx.evaluation.reporting import TaskReport, flat
from d2ctx.evaluation.semantic_records import TASK as SEMANTIC
from d2ctx.evaluation.semantic_records import LabelCounts, count_labels, record_labels
from d2ctx.files import write_text

logger = logging.getLogger(__name__)

NAME = "panoptic_predictions"  # of the json, and of the folder of PNGs beside it
TASK = "panoptic_seg"
_KINDS = {"All": "", "Things": "_th", "Stuff": "_st"}


class PanopticEvaluator(DatasetEvaluator):
    """Panoptic quality; predictions are written as a server takes them.

    What was found in every image is kept for `python -m d2ctx.compare`.

    Each process writes its PNGs as they come, so that nothing but the lists of segments is held in
    memory. A data set without annotations is not scored.

    Args:
        dataset_name: A data set whose metadata name `panoptic_json` and `panoptic_root`.
        folder: Where `panoptic_predictions.json` and the folder of that name go.
        official: Whether cityscapesScripts' code computes the averages, instead of ours, which
            gives the same.
    """

    def __init__(self, dataset_name: str, *, folder: Path, official: bool = False):
        self.metadata = MetadataCatalog.get(dataset_name)
        self.folder = folder
        self.official = official
        self.reports: dict[str, TaskReport] = {}
        self.annotations: list[dict[str, Any]] = []
        self.labels: list[LabelCounts] = []

    def reset(self) -> None:
        """Forget everything that was processed, and take earlier predictions away."""
        self.annotations, self.labels = [], []
        self.reports = {}
        if comm.is_main_process():
            for name in (f"{NAME}.json", record_name(TASK), record_name(SEMANTIC)):
                (self.folder / name).unlink(missing_ok=True)
            shutil.rmtree(self.folder / NAME, ignore_errors=True)
            (self.folder / NAME).mkdir(parents=True)
        comm.synchronize()

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """Write the predictions of a batch.

        Args:
            inputs: Detectron2's dict of each image: `image_id`.
            outputs: The model's dict of each image: `panoptic_seg`, and perhaps `sem_seg`.
        """
        for image, output in zip(inputs, outputs, strict=True):
            if (truth := self._stuff_map(image["image_id"])) and SEMANTIC in output:
                self.labels.append(self._count(image["image_id"], truth, output[SEMANTIC]))
            ids, segments = output[TASK]
            ids = ids.cpu().numpy()
            file_name = png_name(image["image_id"])
            write_ids(self.folder / NAME / file_name, ids)
            self.annotations.append(
                {
                    "image_id": image["image_id"],
                    "file_name": file_name,
                    "segments_info": self._segments(ids, segments),
                }
            )

    def _stuff_map(self, image_id: int | str) -> Path | None:
        """What the semantic branch should say, where that was made of the ground truth."""
        definition = self.metadata.get("definition")
        definition = getattr(definition, "panoptic", definition)  # of Cityscapes
        path = definition.stuff_map(image_id) if definition else None
        return path if path is not None and path.is_file() else None

    def _count(self, image_id: int | str, truth: Path, logits: Tensor) -> LabelCounts:
        """Pixels of the semantic branch alone, before things are laid over it."""
        with Image.open(truth) as opened:
            labels = np.asarray(opened)
        return count_labels(
            png_name(image_id),
            labels,
            logits.argmax(dim=0).cpu().numpy(),
            num_classes=len(self.metadata.stuff_classes),
            ignored=self.metadata.ignore_label,
        )

    def _segments(self, ids: np.ndarray, segments: Sequence[dict]) -> list[dict[str, Any]]:
        """The segments that have pixels, with the data set's category ids and areas."""
        category_of = {
            True: _reversed(self.metadata.thing_dataset_id_to_contiguous_id),
            False: _reversed(self.metadata.stuff_dataset_id_to_contiguous_id),
        }
        areas = dict(zip(*(a.tolist() for a in np.unique(ids, return_counts=True)), strict=True))
        return [
            {
                "id": int(s["id"]),
                "category_id": int(category_of[bool(s["isthing"])][s["category_id"]]),
                "area": areas[s["id"]],
            }
            for s in segments
            if s["id"] != VOID and s["id"] in areas
        ]

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Write the json of all predictions and score them; on the main process only.

        Returns:
            "panoptic_seg" -> PQ, SQ, RQ, the same of things (_th) and stuff (_st), and PQ of each
            class, in percent.

        Raises:
            UserError: If the ground truth is broken, or an image has no prediction.
        """
        comm.synchronize()
        annotations = list(chain.from_iterable(comm.gather(self.annotations)))
        labels = list(chain.from_iterable(comm.gather(self.labels)))
        if not comm.is_main_process():
            return {}
        truth = read_json(Path(self.metadata.panoptic_json))
        predicted = {"annotations": annotations, "categories": truth["categories"]}
        path = self.folder / f"{NAME}.json"
        write_text(path, json.dumps(predicted))
        if "annotations" not in truth:
            logger.info("No annotations: predictions are in %s, not scored", path)
            return {}
        self._check_files(annotations)
        self.reports[TASK] = self._score(truth, predicted)
        if len(labels) == len(truth["annotations"]):
            names, dataset = self.metadata.stuff_classes, self.metadata.name
            record_labels(labels, classes=names, dataset=dataset).write(self.folder)
        logger.info(_table(self.reports[TASK]))
        return {TASK: flat(self.reports[TASK], name="PQ")}

    def _check_files(self, annotations: Sequence[dict]) -> None:
        root = self.folder / NAME
        absent = [a["file_name"] for a in annotations if not (root / a["file_name"]).is_file()]
        if absent:
            raise UserError(
                f"{len(absent)} of {len(annotations)} predictions are not in {root} "
                f"({absent[0]}, ...); set OUTPUT_DIR to a folder that all machines share"
            )

    def _score(self, truth: dict[str, Any], predicted: dict[str, Any]) -> TaskReport:
        sides = {
            "truth": truth,
            "truth_root": Path(self.metadata.panoptic_root),
            "predicted": predicted,
            "predicted_root": self.folder / NAME,
        }
        counts = count_images(**sides)  # first: its errors name the file and the ids
        record_segments(truth, counts, task=TASK, dataset=self.metadata.name).write(self.folder)
        found = summarize(add_counts(counts), truth["categories"])
        notes = [
            f"no {kind.lower()} in the ground truth or the predictions: their averages do not exist"
            for kind in _KINDS
            if not found[kind]["n"]
        ]
        name, version = "d2ctx", _own_version()
        if self.official and not notes:  # without any thing or stuff it divides by zero
            name, version = cityscapes_official.PACKAGE, cityscapes_official.version()
            averages = cityscapes_official.panoptic_quality(**sides)
            found.update({kind: averages[kind] for kind in _KINDS})
        ordered = sorted(truth["categories"], key=lambda category: category["id"])
        names = class_names(ordered)
        per_class = {
            n: _class_values(found["per_class"][c["id"]])
            for n, c in zip(names, ordered, strict=True)
        }
        return TaskReport(
            evaluator=name,
            version=version,
            images=len(truth["annotations"]),
            classes=names,
            values=_values(found),
            per_class=per_class,
            notes=notes,
        )


def png_name(image_id: int | str) -> str:
    """The name of an image's PNG: twelve digits as COCO writes them, or the image's own name."""
    if isinstance(image_id, int):
        return f"{image_id:012d}.png"
    return f"{quote(image_id, safe='')}.png"


def _own_version() -> str:
    try:
        return metadata.version("ctxseg")
    except metadata.PackageNotFoundError:  # used from a checkout
        return "not installed"


def _reversed(mapping: dict[int, int]) -> dict[int, int]:
    return {contiguous: category for category, contiguous in mapping.items()}


def _values(found: dict[str, Any]) -> dict[str, float]:
    return {
        f"{key.upper()}{suffix}": 100 * found[kind][key]
        for kind, suffix in _KINDS.items()
        for key in ("pq", "sq", "rq")
    }


def _class_values(found: dict[str, Any]) -> dict[str, float]:
    counts = {key.upper(): found[key] for key in ("tp", "fp", "fn")}
    return {key.upper(): 100 * found[key] for key in ("pq", "sq", "rq")} | counts


def _table(report: TaskReport) -> str:
    seen = {n: v for n, v in report.per_class.items() if not math.isnan(v["PQ"])}
    keys = ("PQ", "SQ", "RQ", "TP", "FP", "FN")
    rows = [[name, *(values[key] for key in keys)] for name, values in seen.items()]
    rows += [
        [kind.lower(), *(report.values[f"{key}{suffix}"] for key in keys[:3])]
        for kind, suffix in _KINDS.items()
    ]
    table = tabulate(rows, ["class", *keys], floatfmt=".3f", tablefmt="pipe")
    return f"{TASK} ({report.evaluator} {report.version})\n{table}"
