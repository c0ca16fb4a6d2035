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
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    if kind not in _BUILDERS:
        raise UserError(
            f"data set {dataset_name!r} asks for evaluator {kind!r}; known: {sorted(_BUILDERS)}. "
            f"Register it under DATASETS.COCO_FORMAT, or set its metadata's evaluator_type"
        )
    return _BUILDERS[kind](dataset_name, str(Path(cfg.OUTPUT_DIR, "inference", dataset_name)))
