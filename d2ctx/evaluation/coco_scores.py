"""COCO's average precision: faster-coco-eval where it is installed, else pycocotools.

Both give the same twelve statistics; a test holds them to it.
"""

import contextlib
import copy
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np

# Names of COCOeval.stats, in their order.
STATISTICS = ("AP", "AP50", "AP75", "APs", "APm", "APl") + (
    "AR1",
    "AR10",
    "AR100",
    "ARs",
    "ARm",
    "ARl",
)
# What a result holds besides the image, the category and the score.
FIELDS = {"bbox": "bbox", "segm": "segmentation"}


@dataclass(frozen=True)
class CocoApi:
    """One implementation of COCO's evaluation.

    Attributes:
        package: Name on the package index.
        coco: Its class COCO.
        coco_eval: Its class COCOeval.
    """

    package: str
    coco: type
    coco_eval: type

    @property
    def version(self) -> str:
        """The installed version."""
        return metadata.version(self.package)


def pycocotools_api() -> CocoApi:
    """The original."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return CocoApi("pycocotools", COCO, COCOeval)


def coco_api() -> CocoApi:
    """The fastest installed implementation."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ModuleNotFoundError:
        return pycocotools_api()
    return CocoApi("faster-coco-eval", COCO, COCOeval_faster)


@dataclass(frozen=True)
class Scores:
    """Percentages; NaN where nothing can be said, as for a class without ground truth.

    Attributes:
        statistics: The twelve of `STATISTICS`.
        per_class: Class name -> AP, AP50 and AR100, in the order of the category ids.
    """

    statistics: dict[str, float]
    per_class: dict[str, dict[str, float]]


def average_precision(
    truth: Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    *,
    task: str,
    api: CocoApi | None = None,
) -> Scores:
    """Score detections.

    For masks the boxes of the detections are left out: COCO's code would take small, medium and
    large from them instead of from the masks.

    Args:
        truth: Content of a json in COCO's instance format, with annotations.
        detections: Results in COCO's format, with the json's category ids.
        task: "bbox" or "segm".
        api: Implementation; None takes the fastest installed.

    Returns:
        The scores. Without any detection they are 0, not NaN, where there is ground truth.
    """
    api = api or coco_api()
    content, numbers = _with_integer_ids(truth)
    fields = ("category_id", "score", FIELDS[task])
    results = [
        {"image_id": numbers.get(d["image_id"], d["image_id"]), **{f: d[f] for f in fields}}
        for d in detections
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        known = _indexed(api, content)
        found = known.loadRes(results) if results else _nothing(api, content)
        evaluation = api.coco_eval(known, found, task)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    ordered = class_names(content["categories"])
    statistics = dict(zip(STATISTICS, map(_percent, evaluation.stats), strict=True))
    return Scores(statistics, _per_class(evaluation.eval, ordered))


def class_names(categories: Sequence[Mapping[str, Any]]) -> list[str]:
    """Class names in the order of their ids; names that stand twice get their id added.

    Args:
        categories: The list "categories" of a json.

    Returns:
        One name for each category.
    """
    names = [category["name"] for category in categories]
    ordered = sorted(categories, key=lambda category: category["id"])
    return [
        c["name"] if names.count(c["name"]) == 1 else f"{c['name']} ({c['id']})" for c in ordered
    ]


def _with_integer_ids(truth: Mapping[str, Any]) -> tuple[dict[str, Any], dict[Any, int]]:
    """A copy with numbers for image ids that are names, which only pycocotools understands."""
    content = copy.deepcopy(dict(truth))  # the evaluation writes into it
    ids = [image["id"] for image in content["images"]]
    if all(isinstance(i, int) for i in ids):
        return content, {}
    numbers = {name: number for number, name in enumerate(sorted(ids, key=str), start=1)}
    for image in content["images"]:
        image["id"] = numbers[image["id"]]
    for annotation in content["annotations"]:
        annotation["image_id"] = numbers[annotation["image_id"]]
    return content, numbers


def _indexed(api: CocoApi, content: dict[str, Any]) -> Any:
    coco = api.coco()
    coco.dataset = content
    coco.createIndex()
    return coco


def _nothing(api: CocoApi, content: dict[str, Any]) -> Any:
    """What `loadRes` would return for no result, which not every version accepts."""
    return _indexed(api, {**content, "annotations": []})


def _per_class(table: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[str, float]]:
    precision = np.asarray(table["precision"])  # [IoU, recall, class, area, detections]
    recall = np.asarray(table["recall"])  # [IoU, class, area, detections]
    return {
        name: {
            "AP": _mean_percent(precision[:, :, k, 0, -1]),
            "AP50": _mean_percent(precision[0, :, k, 0, -1]),
            "AR100": _mean_percent(recall[:, k, 0, -1]),
        }
        for k, name in enumerate(names)
    }


def _mean_percent(values: np.ndarray) -> float:
    known = values[values > -1]
    return 100 * float(known.mean()) if known.size else math.nan


def _percent(value: float) -> float:
    return 100 * float(value) if value > -1 else math.nan
