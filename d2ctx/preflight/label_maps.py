"""Checks of the label maps that the semantic branch of Hybrid Task Cascade learns from."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from PIL import Image

from d2ctx.datasets import label_map
from d2ctx.evaluation.panoptic_files import BROKEN_IMAGE
from d2ctx.preflight.coco_json import CocoFile
from d2ctx.preflight.findings import Findings
from d2ctx.preflight.images import lies_on_its_side
from d2ctx.preflight.sources import Source
from d2ctx.wording import first_of, plural

_OFF = "or set MODEL.HTC.SEMANTIC.ENABLED False"
_WORKERS = 8
# Decoding every map would double the time of the check; a wrong numbering shows in a few.
_LABELS_READ = 200


def needs_maps(cfg: CfgNode) -> bool:
    """Whether the model has a semantic branch that learns from label maps."""
    return cfg.MODEL.ROI_HEADS.NAME == "HybridTaskROIHeads" and cfg.MODEL.HTC.SEMANTIC.ENABLED


def check_maps_are_named(sources: list[Source], findings: Findings) -> None:
    """Check that every training set says where its label maps lie."""
    for source in sources:
        if source.train and not source.semantic_root:
            findings.errors.append(
                f"{source.name} has no stuff-thing maps, which the semantic branch learns from; "
                f"name their folder as DATASETS.COCO_FORMAT.<data set>.SEM_SEG, {_OFF}"
            )


def check_label_maps(cfg: CfgNode, file: CocoFile, findings: Findings) -> None:
    """Check that every image has a map of its size, and that the labels are classes.

    Labels are looked at in the first 200 maps.

    Args:
        cfg: The configuration, with a semantic branch.
        file: A training set's json; its images are checked elsewhere.
        findings: Takes one line for each kind of problem.
    """
    if not (file.source.from_yaml and file.source.semantic_root):
        return  # another registration names the maps its own way
    images = list(file.images.values())
    examine = partial(_problem, root=file.source.semantic_root, node=cfg.MODEL.HTC.SEMANTIC)
    labels = [number < _LABELS_READ for number in range(len(images))]
    with ThreadPoolExecutor(_WORKERS) as pool:
        problems = list(filter(None, pool.map(examine, images, labels)))
    for kind, fix in _FIXES.items():
        shown = [text for found, text in problems if found == kind]
        if shown:
            findings.errors.append(
                f"{file.source.name}: {len(shown)} of {plural(len(images), 'label map')} below "
                f"{file.source.semantic_root} {kind} ({first_of(shown)}); {fix}"
            )


_FIXES = {
    "absent": f"copy them, {_OFF}",
    "unreadable": "copy them again",
    "of another kind": "write PNG files of one 8-bit channel that holds class numbers",
    "of another size than the image": "write them at the image's size",
    "with unknown labels": "set MODEL.HTC.SEMANTIC.NUM_CLASSES, or write 255 where none is known",
}


def _problem(
    image: dict[str, Any], labels: bool, *, root: str, node: CfgNode
) -> tuple[str, str] | None:
    """Kind and example of what is wrong with an image's map; None where nothing is."""
    name = image["file_name"]
    try:
        if not os.path.isfile(label_map(root, name)):  # a pipe would be waited for
            return "absent", name
        with Image.open(label_map(root, name)) as found:
            return next(_differences(image, found, labels, node), None)
    except FileNotFoundError:
        return "absent", name
    except BROKEN_IMAGE as error:
        return "unreadable", f"{name}: {error}"


def _differences(
    image: dict[str, Any], found: Image.Image, labels: bool, node: CfgNode
) -> Iterator[tuple[str, str]]:
    name, size = image["file_name"], (image["width"], image["height"])
    shown = found.size[::-1] if lies_on_its_side(found) else found.size
    if found.mode != "L":
        # Detectron2 would turn colours, also those of a palette, into brightness.
        yield "of another kind", f"{name}: mode {found.mode}"
    if shown != size:
        yield "of another size than the image", f"{name}: {shown} instead of {size}"
    if labels:
        values = np.unique(np.asarray(found))
        values = values[(values >= node.NUM_CLASSES) & (values != node.IGNORE_VALUE)]
        if values.size:
            yield "with unknown labels", f"{name}: {values[0]} of {node.NUM_CLASSES} classes"
