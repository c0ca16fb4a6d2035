"""Evaluators chosen from a data set's metadata."""

from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator

from d2ctx.errors import UserError


def _coco(name: str, folder: str) -> DatasetEvaluator:
    # The fast implementation needs Detectron2's compiled extension; the numbers are the same.
    return COCOEvaluator(name, output_dir=folder, use_fast_impl=False)


_BUILDERS = {"coco": _coco}


def missing_evaluator(dataset_name: str) -> str:
    """Why a registered data set cannot be evaluated, or "" where it can."""
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    if kind in _BUILDERS:
        return ""
    return (
        f"data set {dataset_name!r} asks for evaluator {kind!r}; known: {sorted(_BUILDERS)}; "
        "register it under DATASETS.COCO_FORMAT, or take it out of DATASETS.TEST"
    )


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """Build the evaluator that a data set's `evaluator_type` asks for.

    Args:
        cfg: Configuration; results go to `OUTPUT_DIR/inference/<data set>`.
        dataset_name: A registered data set.

    Returns:
        An evaluator for `detectron2.evaluation.inference_on_dataset`.

    Raises:
        UserError: If the data set names an evaluator we do not have.
    """
    if problem := missing_evaluator(dataset_name):
        raise UserError(problem)
    kind = MetadataCatalog.get(dataset_name).evaluator_type
    return _BUILDERS[kind](dataset_name, str(Path(cfg.OUTPUT_DIR, "inference", dataset_name)))
