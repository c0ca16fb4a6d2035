"""Evaluators chosen from a data set's metadata and from what the model predicts."""

from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.modeling import META_ARCH_REGISTRY, PanopticFPN, ProposalNetwork

from d2ctx.cityscapes_data import EVALUATOR
from d2ctx.errors import UserError
from d2ctx.evaluation.cityscapes import CityscapesInstanceEvaluator
from d2ctx.evaluation.coco import CocoEvaluator
from d2ctx.evaluation.panoptic import PanopticEvaluator
from d2ctx.evaluation.reporting import Reporting, ReportingEvaluators


def _coco(cfg: CfgNode, name: str, folder: Path) -> list[Reporting]:
    tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
    return [CocoEvaluator(name, folder=folder, tasks=tasks)]


def _coco_panoptic(cfg: CfgNode, name: str, folder: Path) -> list[Reporting]:
    panoptic = [PanopticEvaluator(name, folder=folder)] if predicts_panoptic(cfg) else []
    return [*panoptic, *_coco(cfg, name, folder)]


def _cityscapes(cfg: CfgNode, name: str, folder: Path) -> list[Reporting]:
    evaluators: list[Reporting] = []
    if predicts_panoptic(cfg):
        evaluators.append(PanopticEvaluator(name, folder=folder, official=True))
    if cfg.MODEL.MASK_ON:
        evaluators.append(CityscapesInstanceEvaluator(name, folder=folder))
    return evaluators or _coco(cfg, name, folder)


# By the metadata's evaluator_type.
_BUILDERS = {"coco": _coco, "coco_panoptic_seg": _coco_panoptic, EVALUATOR: _cityscapes}


def missing_evaluator(dataset_name: str) -> str:
    """Why a registered data set cannot be evaluated, or "" where it can."""
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    if kind in _BUILDERS:
        return ""
    return (
        f"data set {dataset_name!r} asks for evaluator {kind!r}; known: {sorted(_BUILDERS)}; "
        "define it under DATASETS.COCO_FORMAT, COCO_PANOPTIC or CITYSCAPES, or take it out of "
        "DATASETS.TEST"
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
    folder = Path(cfg.OUTPUT_DIR, "inference", dataset_name)
    if cfg.MODEL.KEYPOINT_ON or predicts(cfg, ProposalNetwork):
        # Detectron2's own evaluator knows keypoints and proposals; ours does not. Its fast
        # implementation needs the compiled extension; the numbers are the same.
        return COCOEvaluator(dataset_name, output_dir=str(folder), use_fast_impl=False)
    kind = MetadataCatalog.get(dataset_name).evaluator_type
    evaluators = _BUILDERS[kind](cfg, dataset_name, folder)
    return ReportingEvaluators(evaluators, dataset_name=dataset_name, folder=folder)


def predicts(cfg: CfgNode, architecture: type) -> bool:
    """Whether the configured meta-architecture is of a kind."""
    name = cfg.MODEL.META_ARCHITECTURE
    found = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
    return isinstance(found, type) and issubclass(found, architecture)


def predicts_panoptic(cfg: CfgNode) -> bool:
    """Whether the model predicts `panoptic_seg`."""
    return predicts(cfg, PanopticFPN)
