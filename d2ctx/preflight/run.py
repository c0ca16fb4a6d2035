"""The check of a whole run, in the order from cheap to dear."""

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, RetinaNet

from d2ctx.bottom_up import unused_context
from d2ctx.config_file import get_value
from d2ctx.preflight.annotations import Wanted, check_annotations
from d2ctx.preflight.coco_json import CocoFile, check_classes, read_coco
from d2ctx.preflight.findings import Findings
from d2ctx.preflight.images import check_images
from d2ctx.preflight.label_maps import check_label_maps, check_maps_are_named, needs_maps
from d2ctx.preflight.panoptic import check_instances, check_stuff_is_known, prepare_panoptic
from d2ctx.preflight.settings import (
    check_batch,
    check_devices,
    check_output,
    check_solver,
    check_weights,
)
from d2ctx.preflight.sources import Source, check_evaluators, find_sources, present_sources
from d2ctx.wording import plural

LEVELS = ("full", "headers", "off")


def check_run(
    cfg: CfgNode, *, eval_only: bool, resume: bool = False, num_gpus: int = 1, num_machines: int = 1
) -> list[str]:
    """Check everything that training or evaluation would trip over later.

    Call it once, before processes are launched and after `register_datasets`.
    `DATASETS.CHECK` says how the data are checked: "full" decodes every image (those that were
    whole at an earlier start are not read again), "headers" reads their sizes, "off" looks only
    whether files and folders are there.

    Args:
        cfg: A merged configuration with our nodes.
        eval_only: Whether only the test sets are used.
        resume: Whether the run may continue from its last checkpoint.
        num_gpus: GPUs per machine, as on the command line.
        num_machines: Machines.

    Returns:
        Lines to print: each data set with its counts, then what is worth knowing.

    Raises:
        UserError: With everything that was found wrong, each with its fix.
    """
    lines, findings = examine_run(
        cfg, eval_only=eval_only, resume=resume, num_gpus=num_gpus, num_machines=num_machines
    )
    findings.raise_errors()
    return lines + [f"note: {note}" for note in findings.notes]


def examine_run(
    cfg: CfgNode, *, eval_only: bool, resume: bool = False, num_gpus: int = 1, num_machines: int = 1
) -> tuple[list[str], Findings]:
    """The same checks, with the findings as they are instead of an error.

    Args:
        cfg: A merged configuration with our nodes.
        eval_only: Whether only the test sets are used.
        resume: Whether the run may continue from its last checkpoint.
        num_gpus: GPUs per machine, as on the command line.
        num_machines: Machines.

    Returns:
        A line for each data set, and what was found.
    """
    findings = Findings()
    if cfg.DATASETS.CHECK not in LEVELS:
        findings.errors.append(
            f"DATASETS.CHECK must be one of {', '.join(LEVELS)}, got {cfg.DATASETS.CHECK!r}"
        )
    check_devices(cfg, num_gpus=num_gpus, findings=findings)
    if not eval_only:
        check_batch(cfg, world_size=num_gpus * num_machines, findings=findings)
        check_solver(cfg, findings)
    findings.errors += unused_context(cfg)
    check_output(cfg, findings)
    check_weights(cfg, eval_only=eval_only, resume=resume, findings=findings)
    sources = find_sources(cfg, eval_only=eval_only, findings=findings)
    check_evaluators(sources, findings)
    if needs_maps(cfg):
        check_maps_are_named(sources, findings)
    check_stuff_is_known(cfg, sources, findings)
    present = prepare_panoptic(cfg, present_sources(sources, findings), findings)
    return _check_data(cfg, present, findings), findings


def _check_data(cfg: CfgNode, sources: list[Source], findings: Findings) -> list[str]:
    if cfg.DATASETS.CHECK == "off":
        return [f"{source.name}: not checked (DATASETS.CHECK off)" for source in sources]
    files = [read_coco(source, findings) for source in sources if source.is_coco]
    files = [f for f in files if f is not None and check_instances(f, findings)]
    key = class_count_key(cfg)
    check_classes(files, key=key, wanted=get_value(cfg, key) if key else 0, findings=findings)
    for file in files:
        wanted = Wanted(
            masks=cfg.MODEL.MASK_ON,
            polygons=file.source.train and cfg.INPUT.MASK_FORMAT == "polygon",
            evaluation=file.source.test,
        )
        check_annotations(file, wanted, findings)
        _check_not_empty(cfg, file, findings)
        _check_scored(file, findings)
    for file in files:
        check_images(file, decode=cfg.DATASETS.CHECK == "full", findings=findings)
        if needs_maps(cfg) and file.source.train:
            check_label_maps(cfg, file, findings)
    others = [source.name for source in sources if not source.is_coco]
    return [summary(file) for file in files] + [
        f"{name}: not in COCO's instance format, files not checked" for name in others
    ]


def class_count_key(cfg: CfgNode) -> str | None:
    """The key that says how many classes of things the model has; None where it has none."""
    name = cfg.MODEL.META_ARCHITECTURE
    architecture = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
    if not isinstance(architecture, type):
        return None
    if issubclass(architecture, RetinaNet):
        return "MODEL.RETINANET.NUM_CLASSES"
    return "MODEL.ROI_HEADS.NUM_CLASSES" if issubclass(architecture, GeneralizedRCNN) else None


def _check_not_empty(cfg: CfgNode, file: CocoFile, findings: Findings) -> None:
    name = file.source.name
    if not file.images:
        findings.errors.append(
            f"{name}: {file.source.json_file} lists no image; {file.source.fix('JSON')}"
        )
        return
    if not (file.source.train and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS):
        return
    used = {a["image_id"] for a in file.annotations if not a.get("iscrowd")} & file.images.keys()
    unused = len(file.images) - len(used)
    if not used:
        findings.errors.append(
            f"{name}: no image has an object that is not a crowd, nothing is left to train on; "
            "annotate some, or set DATALOADER.FILTER_EMPTY_ANNOTATIONS False"
        )
    elif unused:
        findings.notes.append(
            f"{name}: {unused} of {plural(len(file.images), 'image')} have no object and are not "
            "trained on (DATALOADER.FILTER_EMPTY_ANNOTATIONS)"
        )


def _check_scored(file: CocoFile, findings: Findings) -> None:
    if not file.source.test or file.annotations:
        return
    why = "has no annotations: its results are written, not scored"
    if file.annotations is not None:
        why = "holds no annotated object: its average precision will not exist"
    findings.notes.append(f"{file.source.name}: {file.source.json_file} {why}")


def summary(file: CocoFile) -> str:
    """The line that says how large a data set is."""
    annotations = file.annotations or []
    crowd = sum(bool(annotation.get("iscrowd")) for annotation in annotations)
    instances = plural(len(annotations), "instance") + (f" ({crowd} crowd)" if crowd else "")
    classes = plural(len(file.class_names), "class")
    return f"{file.source.name}: {plural(len(file.images), 'image')}, {instances}, {classes}"
