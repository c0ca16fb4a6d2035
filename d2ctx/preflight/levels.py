"""Checks that every part of the model asks for maps that the part below it gives."""

from collections.abc import Collection, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    GeneralizedRCNN,
    PanopticFPN,
    ProposalNetwork,
    RetinaNet,
    SemanticSegmentor,
    build_backbone,
)

from d2ctx.errors import UserError

# Detectron2's builders around MODEL.FPN; ours check it themselves.
_FPN_BUILDERS = ("build_resnet_fpn_backbone", "build_retinanet_resnet_fpn_backbone")
STAGES = ("stem", "res2", "res3", "res4", "res5")
# Which sections below MODEL name maps of the backbone in IN_FEATURES.
_READERS = {
    "RPN": (GeneralizedRCNN, ProposalNetwork),
    "ROI_HEADS": (GeneralizedRCNN,),
    "SEM_SEG_HEAD": (PanopticFPN, SemanticSegmentor),
    "RETINANET": (RetinaNet,),
}


def check_levels(cfg: CfgNode) -> None:
    """Check the names of maps, from the ResNet to the heads, and the anchors of each.

    The backbone is built without memory to learn what it gives.

    Args:
        cfg: A configuration whose parts are registered.

    Raises:
        UserError: If a part asks for a map that there is not, or the anchors are for another number
            of maps; or if the backbone cannot be built.
    """
    resnet, backbone = cfg.MODEL.RESNETS.OUT_FEATURES, cfg.MODEL.BACKBONE.NAME
    _check_given("RESNETS.OUT_FEATURES", resnet, STAGES, giver="a ResNet")
    if backbone in _FPN_BUILDERS:
        wanted = cfg.MODEL.FPN.IN_FEATURES
        _check_given("FPN.IN_FEATURES", wanted, resnet, giver="MODEL.RESNETS.OUT_FEATURES")
    given = _maps(cfg)
    for section in _readers(cfg):
        names = cfg.MODEL[section].IN_FEATURES
        _check_given(f"{section}.IN_FEATURES", names, given, giver=backbone)
        if section in ("RPN", "RETINANET"):
            _check_anchors(cfg, section, len(names))


def _maps(cfg: CfgNode) -> list[str]:
    try:
        with torch.device("meta"):
            return list(build_backbone(cfg).output_shape())
    except (AssertionError, KeyError) as error:  # how Detectron2 refuses a value
        raise UserError(
            f"{cfg.MODEL.BACKBONE.NAME} cannot be built, {type(error).__name__}: {error}; look "
            "for this value in MODEL.BACKBONE, MODEL.RESNETS and the neck's section"
        ) from error


def _readers(cfg: CfgNode) -> list[str]:
    architecture = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    if not isinstance(architecture, type):
        return []
    readers = [section for section, kinds in _READERS.items() if issubclass(architecture, kinds)]
    return [s for s in readers if s != "RPN" or cfg.MODEL.PROPOSAL_GENERATOR.NAME == "RPN"]


def _check_given(key: str, names: Sequence[str], given: Collection[str], *, giver: str) -> None:
    if absent := [name for name in names if name not in given]:
        raise UserError(
            f"MODEL.{key} names {absent}, but {giver} gives {list(given)}; name some of these"
        )


def _check_anchors(cfg: CfgNode, section: str, count: int) -> None:
    for key in ("SIZES", "ASPECT_RATIOS"):
        value = cfg.MODEL.ANCHOR_GENERATOR[key]
        if value and isinstance(value[0], Sequence) and len(value) not in (1, count):
            raise UserError(
                f"MODEL.ANCHOR_GENERATOR.{key} has {len(value)} lists, but MODEL.{section}."
                f"IN_FEATURES names {count} maps; give one list for each, or one for all"
            )
