"""The bottom-up network of every backbone here: Detectron2's ResNet with or without context.

One function, `build_bottom_up`, so that any neck stands on any of them.
"""

from collections.abc import Callable, Sequence
from functools import partial

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, build_resnet_backbone
from torch import nn

from ctxops.heads.global_context import GlobalContext
from ctxops.heads.non_local import NonLocal
from d2ctx.backbone import PyramidBackbone
from d2ctx.compat import LastLevelMaxPool
from d2ctx.context_resnet import ContextResNet, augment_convolutions, make_contexts
from d2ctx.errors import UserError
from d2ctx.norm import usable_norm
from d2ctx.sr import build_sr
from d2ctx.wording import did_you_mean

KINDS = ("none", "nl", "gc", "aa", "sr")
KEY = "MODEL.CONTEXT_BLOCK.KIND"


def build_bottom_up(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """ResNet or ResNeXt (`MODEL.RESNETS`) with the context of `MODEL.CONTEXT_BLOCK`.

    Args:
        cfg: Configuration after `add_d2ctx_config`.
        input_shape: Channels of the input image.

    Returns:
        Detectron2's ResNet, or a `ContextResNet` around it.

    Raises:
        UserError: If the kind of context is unknown, or its values describe no module.
    """
    kind = cfg.MODEL.CONTEXT_BLOCK.KIND
    if kind not in KINDS:
        raise UserError(f"{KEY}: there is no {kind!r}; {did_you_mean(kind, KINDS)}")
    resnet = build_resnet_backbone(cfg, input_shape)
    section = "SR" if kind == "sr" else "CONTEXT_BLOCK"
    node = cfg.MODEL[section]
    if kind != "none" and not node.STAGES:
        raise UserError(f"MODEL.{section}.STAGES is empty; name stages, or set {KEY} none")
    try:
        if kind == "none":
            return resnet
        if kind == "aa":
            return augment_convolutions(resnet, stages=node.STAGES, blocks=node.BLOCKS)
        makers = {"nl": _non_local, "gc": _global_context, "sr": build_sr}
        contexts = make_contexts(
            resnet, partial(makers[kind], cfg), stages=node.STAGES, blocks=node.BLOCKS
        )
        return ContextResNet(resnet=resnet, contexts=contexts)
    except ValueError as error:
        raise UserError(f"MODEL.{section}: {error}") from error


def _non_local(cfg: CfgNode, channels: int) -> NonLocal:
    node = cfg.MODEL.CONTEXT_BLOCK
    norm = usable_norm(cfg, node.NORM, key="CONTEXT_BLOCK.NORM")
    return NonLocal(in_channels=channels, reduction=node.REDUCTION, norm=norm)


def _global_context(cfg: CfgNode, channels: int) -> GlobalContext:
    return GlobalContext(in_channels=channels, reduction=cfg.MODEL.CONTEXT_BLOCK.REDUCTION)


def unused_context(cfg: CfgNode) -> list[str]:
    """What is wrong where the backbone's builder would silently leave the context block out.

    Args:
        cfg: Configuration after `add_d2ctx_config`.

    Returns:
        One message that names a builder which knows of it, or none.
    """
    name, kind = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.CONTEXT_BLOCK.KIND
    if kind == "none" or not BACKBONE_REGISTRY.get(name).__module__.startswith("detectron2."):
        return []
    return [
        f"{KEY} is {kind}, but MODEL.BACKBONE.NAME {name} is Detectron2's, which knows of no "
        "context; use build_context_resnet_fpn_backbone or another of ours"
    ]


# ---- with a neck -----------------------------------------------------------------------------
def in_channels_of(bottom_up: Backbone, in_features: Sequence[str], *, section: str) -> list[int]:
    """Channels of the maps that a neck asks for.

    Args:
        bottom_up: The network below.
        in_features: Their names.
        section: Section below MODEL that asks.

    Returns:
        C of each.

    Raises:
        UserError: If the network lacks one.
    """
    shapes = bottom_up.output_shape()
    if absent := [name for name in in_features if name not in shapes]:
        raise UserError(
            f"MODEL.{section}.IN_FEATURES names {absent}, but MODEL.RESNETS.OUT_FEATURES gives "
            f"{list(shapes)}; name some of these"
        )
    return [shapes[name].channels for name in in_features]


def build_pyramid(
    cfg: CfgNode,
    input_shape: ShapeSpec,
    make_neck: Callable[[list[int]], nn.Module],
    *,
    section: str,
    out_channels: int,
) -> PyramidBackbone:
    """Put a neck on the bottom-up network.

    Args:
        cfg: Configuration after `add_d2ctx_config`.
        input_shape: Channels of the input image.
        make_neck: From C of each input map, fine to coarse, to a neck with one output map more.
        section: The neck's section below MODEL, with IN_FEATURES.
        out_channels: Width of the output maps.

    Returns:
        A backbone with maps p2, p3, ...

    Raises:
        UserError: If the section holds a value that the neck cannot be built with.
    """
    bottom_up = build_bottom_up(cfg, input_shape)
    in_features = cfg.MODEL[section].IN_FEATURES
    in_channels = in_channels_of(bottom_up, in_features, section=section)
    try:
        return PyramidBackbone(
            bottom_up=bottom_up,
            neck=make_neck(in_channels),
            in_features=in_features,
            out_channels=out_channels,
            num_outputs=len(in_features) + 1,
        )
    except ValueError as error:
        raise UserError(f"MODEL.{section}: {error}") from error


# ---- registered builders ---------------------------------------------------------------------
def build_context_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """ResNet with the context of `MODEL.CONTEXT_BLOCK`, without a neck; see `build_bottom_up`."""
    return build_bottom_up(cfg, input_shape)


def build_context_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The same with Detectron2's FPN (`MODEL.FPN`).

    Args:
        cfg: Configuration after `add_d2ctx_config`.
        input_shape: Channels of the input image.

    Returns:
        A backbone with maps p2 to p6.

    Raises:
        UserError: If the context cannot be built, or a map is absent.
    """
    bottom_up, node = build_bottom_up(cfg, input_shape), cfg.MODEL.FPN
    in_channels_of(bottom_up, node.IN_FEATURES, section="FPN")
    return FPN(
        bottom_up=bottom_up,
        in_features=node.IN_FEATURES,
        out_channels=node.OUT_CHANNELS,
        norm=node.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=node.FUSE_TYPE,
    )


def build_sr_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """ResNet with Squeeze Reasoning (`MODEL.SR`), without a neck.

    Args:
        cfg: Configuration after `add_d2ctx_config`.
        input_shape: Channels of the input image.

    Returns:
        A `ContextResNet`.

    Raises:
        UserError: If another context is asked for as well, or `MODEL.SR` describes no module.
    """
    return build_bottom_up(_with_sr(cfg), input_shape)


def build_sr_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The same with Detectron2's FPN (`MODEL.FPN`).

    Args:
        cfg: Configuration after `add_d2ctx_config`.
        input_shape: Channels of the input image.

    Returns:
        A backbone with maps p2 to p6.

    Raises:
        UserError: If another context is asked for as well, or `MODEL.SR` describes no module.
    """
    return build_context_resnet_fpn_backbone(_with_sr(cfg), input_shape)


def _with_sr(cfg: CfgNode) -> CfgNode:
    kind = cfg.MODEL.CONTEXT_BLOCK.KIND
    if kind not in ("none", "sr"):
        raise UserError(
            f"{KEY} is {kind}, but MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} has Squeeze "
            f"Reasoning; set {KEY} none, or use build_context_resnet_fpn_backbone"
        )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.CONTEXT_BLOCK.KIND = "sr"
    return cfg
