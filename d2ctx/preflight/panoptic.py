"""Checks of data sets for Panoptic FPN, and the making of their stuff maps."""

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from d2ctx.cityscapes_data import CityscapesDefinition, convert_cityscapes
from d2ctx.errors import UserError
from d2ctx.evaluation.build import predicts_panoptic
from d2ctx.evaluation.cityscapes_official import rehearse
from d2ctx.panoptic_convert import PanopticDefinition, convert
from d2ctx.panoptic_data import set_classes
from d2ctx.panoptic_json import IGNORED
from d2ctx.preflight.coco_json import CocoFile
from d2ctx.preflight.findings import Findings
from d2ctx.preflight.sources import Source
from d2ctx.wording import first_of, plural


def check_stuff_is_known(cfg: CfgNode, sources: list[Source], findings: Findings) -> None:
    """Check that a model that learns stuff gets stuff maps from every training set."""
    if not predicts_panoptic(cfg):
        return
    for source in sources:
        if source.train and not source.semantic_root:
            findings.errors.append(
                f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} learns stuff, but "
                f"{source.name} has no stuff maps; define it under DATASETS.COCO_PANOPTIC or "
                "DATASETS.CITYSCAPES, or set MODEL.META_ARCHITECTURE ContextRCNN"
            )


def prepare_panoptic(cfg: CfgNode, sources: list[Source], findings: Findings) -> list[Source]:
    """Make the stuff maps and instances of panoptic data sets, and check them meanwhile.

    Args:
        cfg: The configuration.
        sources: Data sets whose files are present.
        findings: Takes what is wrong.

    Returns:
        The data sets that can be checked further.
    """
    sound = [source for source in sources if _prepare(source, findings)]
    panoptic = [source for source in sound if source.is_panoptic]
    _check_stuff_classes(cfg, panoptic, findings)
    if any(source.section == "CITYSCAPES" and source.test for source in sources):
        findings.errors += rehearse()
    return sound


def _prepare(source: Source, findings: Findings) -> bool:
    if not source.is_panoptic:
        return True
    try:
        manifest = convert(_panoptic_definition(source, prepare=True), annotated=source.train)
    except UserError as error:
        findings.errors += [f"{source.name}: {line}" for line in str(error).splitlines()]
        return False
    set_classes(source.name, manifest["categories"])
    return True


def _panoptic_definition(source: Source, *, prepare: bool = False) -> PanopticDefinition:
    definition = MetadataCatalog.get(source.name).definition
    if not isinstance(definition, CityscapesDefinition):
        return definition
    if prepare:
        convert_cityscapes(definition)
    return definition.panoptic


def _check_stuff_classes(cfg: CfgNode, sources: list[Source], findings: Findings) -> None:
    if not (sources and predicts_panoptic(cfg)):
        return
    names = {source.name: MetadataCatalog.get(source.name).stuff_classes for source in sources}
    first, count = sources[0].name, len(names[sources[0].name])
    for name, stuff in names.items():
        if stuff != names[first]:
            findings.errors.append(
                f"{first} and {name} list different stuff categories; write the same list, with "
                "the same ids, into both files"
            )
    head = cfg.MODEL.SEM_SEG_HEAD
    if head.NUM_CLASSES != count:
        findings.errors.append(
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {head.NUM_CLASSES}, but {first} has "
            f"{plural(count - 1, 'stuff class')} and one label for all things; write MODEL: "
            f"{{SEM_SEG_HEAD: {{NUM_CLASSES: {count}}}}} in the YAML, or add "
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES {count} to the command"
        )
    if head.IGNORE_VALUE != IGNORED:
        findings.errors.append(
            f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE is {head.IGNORE_VALUE}, but stuff maps say "
            f"{IGNORED} for void; set MODEL.SEM_SEG_HEAD.IGNORE_VALUE {IGNORED}"
        )


def check_instances(file: CocoFile, findings: Findings) -> bool:
    """Check that INSTANCES_JSON belongs to the panoptic json: the same images, the same things.

    Args:
        file: The instances of a data set.
        findings: Takes what is wrong.

    Returns:
        Whether it does; true of every other data set.
    """
    if not file.source.is_panoptic:
        return True
    meta = MetadataCatalog.get(file.source.name)
    things = meta.thing_dataset_id_to_contiguous_id.keys()
    if differing := sorted(things ^ file.category_ids):
        findings.errors.append(
            f"{file.source.name}: {file.source.json_file} and {meta.panoptic_json} list different "
            f"things (category {first_of(differing)} stands in one only); list the same in both"
        )
        return False
    definition = _panoptic_definition(file.source)
    absent = [i for i in file.images if not definition.stuff_map(i).is_file()]
    if file.annotations is not None and absent:
        findings.errors.append(
            f"{file.source.name}: {plural(len(absent), 'image')} of {len(file.images)} in "
            f"{file.source.json_file} have no stuff map, because {meta.panoptic_json} does not "
            f"annotate them ({first_of(absent)}); annotate them, or take them out"
        )
        return False
    return True
