"""Instances of Cityscapes: written as its server takes them, scored by the official code."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from tabulate import tabulate

from d2ctx.cityscapes_data import cityscapes_definition
from d2ctx.errors import UserError
from d2ctx.evaluation import cityscapes_official
from d2ctx.evaluation.panoptic_files import write_png
from d2ctx.evaluation.reporting import TaskReport, flat
from d2ctx.files import write_text
from d2ctx.wording import first_of, plural

logger = logging.getLogger(__name__)

NAME = "cityscapes_instances"  # folder of the submission
SUFFIX = "_pred.txt"


class CityscapesInstanceEvaluator(DatasetEvaluator):
    """Cityscapes' average precision of instances, by cityscapesScripts.

    Each process writes its files as they come: a text file for each image, also where nothing was
    found, and a mask for each instance.

    Args:
        dataset_name: A data set of `DATASETS.CITYSCAPES`.
        folder: Where the folder `cityscapes_instances` goes.

    Raises:
        UserError: If it is another kind of data set.
    """

    def __init__(self, dataset_name: str, *, folder: Path):
        definition = cityscapes_definition(dataset_name)
        if definition is None:
            raise UserError(
                f"{dataset_name} is no data set of Cityscapes; define it under DATASETS.CITYSCAPES"
            )
        self.definition = definition
        self.metadata = MetadataCatalog.get(dataset_name)
        self.folder = folder / NAME
        self.reports: dict[str, TaskReport] = {}

    def reset(self) -> None:
        """Take earlier predictions away."""
        self.reports = {}
        if comm.is_main_process():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        comm.synchronize()

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """Write the instances of a batch.

        Args:
            inputs: Detectron2's dict of each image: `image_id`.
            outputs: The model's dict of each image: `instances`, with masks.
        """
        contiguous = self.metadata.thing_dataset_id_to_contiguous_id
        label_ids = sorted(contiguous, key=contiguous.get)  # the ids of the json are labelIds
        for image, output in zip(inputs, outputs, strict=True):
            found, name = output["instances"].to("cpu"), image["image_id"]
            lines = []
            for number, mask in enumerate(found.pred_masks):
                file_name = f"{name}_{number:04d}.png"
                write_png(self.folder / file_name, np.asarray(mask, np.uint8) * 255)
                label, score = label_ids[found.pred_classes[number]], float(found.scores[number])
                lines.append(f"{file_name} {label} {score}\n")
            write_text(self.folder / f"{name}{SUFFIX}", "".join(lines))

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Score what all processes wrote; on the main process only.

        Returns:
            "segm" -> AP, AP50 and AP of each class, in percent.

        Raises:
            UserError: If an image has no prediction.
        """
        comm.synchronize()
        if not comm.is_main_process():
            return {}
        truths = self.definition.truths()
        pairs = {path: self.folder / f"{key}{SUFFIX}" for key, path in truths.items()}
        absent = [path.name for path in pairs.values() if not path.is_file()]
        if absent:
            raise UserError(
                f"{plural(len(absent), 'image')} of {len(pairs)} have no prediction in "
                f"{self.folder} ({first_of(absent)}); predict every image of the split, and set "
                "OUTPUT_DIR to a folder that all machines share"
            )
        found = cityscapes_official.instance_ap(pairs, predictions_root=self.folder)
        per_class = {name: _percent(values) for name, values in found["classes"].items()}
        self.reports["segm"] = TaskReport(
            evaluator=cityscapes_official.PACKAGE,
            version=cityscapes_official.version(),
            images=len(pairs),
            classes=list(per_class),
            values=_percent({"ap": found["allAp"], "ap50%": found["allAp50%"]}),
            per_class=per_class,
        )
        rows = [[name, *values.values()] for name, values in per_class.items()]
        logger.info("Cityscapes instances\n%s", tabulate(rows, ["class", "AP", "AP50"]))
        return {"segm": flat(self.reports["segm"], name="AP")}


def _percent(values: dict[str, float]) -> dict[str, float]:
    return {"AP": 100 * float(values["ap"]), "AP50": 100 * float(values["ap50%"])}
