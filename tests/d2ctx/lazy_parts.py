"""Descriptions of tiny models, by `LazyCall` alone: no configuration and no registry."""

from collections.abc import Sequence
from typing import Any

from detectron2.config import LazyCall as L  # noqa: N817 - the name that it has everywhere
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, ResNet
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import BasicStem, BottleneckBlock
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
)
from detectron2.modeling.roi_heads import StandardROIHeads as PlainHeads
from torch import nn

import d2ctx
from ctxops import build_a2fpn
from ctxops.heads.global_context import GlobalContext
from ctxops.heads.non_local import NonLocal
from ctxops.sr import SqueezeReasoning
from d2ctx.cascade_stage import build_sampler
from d2ctx.compat import LastLevelMaxPool
from d2ctx.context_resnet import augment_convolutions
from d2ctx.fpt import build_fpt_neck
from d2ctx.panet_layers import AllLevelPooler

WIDTH, CLASSES, STUFF, STAGES = 16, 2, 3, range(3)
CHANNELS = {"res2": 16, "res3": 32, "res4": 48, "res5": 64}
LEVELS = ["p2", "p3", "p4", "p5"]
STRIDES = {f"p{i}": 2**i for i in range(2, 7)}


def mapping(**values: Any) -> dict[str, Any]:
    """`instantiate` looks into lists, not into plain mappings."""
    return values


SHAPES = L(mapping)(**{n: L(ShapeSpec)(channels=WIDTH, stride=s) for n, s in STRIDES.items()})


# ---- backbones -------------------------------------------------------------------------------
def resnet() -> Any:
    stem = L(BasicStem)(in_channels=3, out_channels=8, norm="BN")
    stages, before = [], 8
    for index, channels in enumerate(CHANNELS.values()):
        stage = L(ResNet.make_stage)(
            block_class=BottleneckBlock,
            num_blocks=1,
            stride_per_block=[1 if index == 0 else 2],
            in_channels=before,
            bottleneck_channels=channels // 2,
            out_channels=channels,
            norm="BN",
        )
        stages, before = [*stages, stage], channels
    return L(ResNet)(stem=stem, stages=stages, out_features=list(CHANNELS))


CONTEXTS = {
    "nl": L(NonLocal)(in_channels=64, reduction=4),
    "gc": L(GlobalContext)(in_channels=64, reduction=4),
    "sr": L(SqueezeReasoning)(in_channels=64, nodes=4, norm="BN", node_norm="LN"),
}


def context_resnet(kind: str) -> Any:
    if kind == "aa":
        return L(augment_convolutions)(resnet=resnet(), stages=["res5"], blocks="all")
    return L(d2ctx.ContextResNet)(resnet=resnet(), contexts=L(mapping)(res5_0=CONTEXTS[kind]))


def pyramid(neck: Any, below: Any = None) -> Any:
    return L(d2ctx.PyramidBackbone)(
        bottom_up=resnet() if below is None else below,
        neck=neck,
        in_features=list(CHANNELS),
        out_channels=WIDTH,
        num_outputs=5,
    )


def a2fpn(**switches: Any) -> Any:
    narrow = {"out_channels": WIDTH, "context_channels": 8, "reduction_channels": 8}
    wide = {"in_channels": list(CHANNELS.values()), "num_contexts": [8, 6, 4, 2]}
    return L(build_a2fpn)(**narrow, **wide, **switches)


def fpt(base: str) -> Any:
    channels = {"in_channels": list(CHANNELS.values()), "channels": WIDTH}
    return L(build_fpt_neck)(**channels, base=base, norm="", extra_level=True)


def fpn(below: Any) -> Any:
    return L(FPN)(
        bottom_up=below,
        in_features=list(CHANNELS),
        out_channels=WIDTH,
        top_block=L(LastLevelMaxPool)(),
    )


LITE = {"extra_level": "maxpool", "out_conv_p2": False}
PAFPN = {"lateral": "conv", "top_down": "nearest", "bottom_up": "conv"}
BACKBONES = {
    "a2fpn": pyramid(a2fpn()),
    "a2fpn_lite": pyramid(a2fpn(**LITE)),
    "pafpn": pyramid(a2fpn(**PAFPN)),
    "fpt": pyramid(fpt("bfp")),
    "fpt_on_fpn": pyramid(fpt("fpn")),
    "a2fpn_on_sr": pyramid(a2fpn(), context_resnet("sr")),
    **{f"fpn_on_{kind}": fpn(context_resnet(kind)) for kind in ("nl", "gc", "aa", "sr")},
}


# ---- heads -----------------------------------------------------------------------------------
def pooler(side: int, names: Sequence[str] = LEVELS, *, kind: Any = ROIPooler) -> Any:
    scales = [1 / STRIDES[name] for name in names]
    return L(kind)(output_size=side, scales=scales, sampling_ratio=2, pooler_type="ROIAlignV2")


def shape(side: int) -> Any:
    return L(ShapeSpec)(channels=WIDTH, height=side, width=side)


def box_head() -> Any:
    return L(FastRCNNConvFCHead)(input_shape=shape(7), conv_dims=[], fc_dims=[32])


def mask_head() -> Any:
    dims = [WIDTH, WIDTH, WIDTH]
    return L(MaskRCNNConvUpsampleHead)(input_shape=shape(14), num_classes=CLASSES, conv_dims=dims)


def predictor(*, agnostic: bool = False) -> Any:
    return L(FastRCNNOutputLayers)(
        input_shape=L(ShapeSpec)(channels=32),
        box2box_transform=L(Box2BoxTransform)(weights=[10.0, 10.0, 5.0, 5.0]),
        num_classes=CLASSES,
        cls_agnostic_bbox_reg=agnostic,
    )


def standard(kind: Any = PlainHeads, **heads: Any) -> Any:
    parts = {"box_head": box_head(), "mask_head": mask_head()}
    parts |= {"box_pooler": pooler(7), "mask_pooler": pooler(14)} | heads
    return L(kind)(
        num_classes=CLASSES,
        batch_size_per_image=16,
        positive_fraction=0.25,
        proposal_matcher=L(Matcher)(thresholds=[0.5], labels=[0, 1]),
        box_in_features=LEVELS,
        box_predictor=predictor(),
        mask_in_features=LEVELS,
        **parts,
    )


def panet() -> Any:
    box = L(d2ctx.PANetBoxHead)(
        input_shape=shape(7), levels=LEVELS, conv_dims=[WIDTH], fc_dims=[32], conv_norm=""
    )
    mask = L(d2ctx.PANetMaskHead)(
        input_shape=shape(14),
        levels=LEVELS,
        num_classes=CLASSES,
        conv_dim=WIDTH,
        num_conv=2,
        conv_norm="",
    )
    return standard(
        d2ctx.PANetROIHeads,
        box_head=box,
        mask_head=mask,
        box_pooler=pooler(7, kind=AllLevelPooler),
        mask_pooler=pooler(14, kind=AllLevelPooler),
    )


def cascade(kind: Any = d2ctx.ContextCascadeROIHeads, **more: Any) -> Any:
    return L(kind)(
        in_features=LEVELS,
        box_pooler=pooler(7),
        box_heads=[box_head() for _ in STAGES],
        box_predictors=[predictor(agnostic=True) for _ in STAGES],
        samplers=[
            L(build_sampler)(num_classes=CLASSES, iou=iou, batch_size_per_image=16)
            for iou in (0.5, 0.6, 0.7)
        ],
        mask_pooler=pooler(14),
        mask_heads=[mask_head() for _ in STAGES],
        **more,
    )


def hybrid() -> Any:
    semantic = L(d2ctx.SemanticBranch)(
        input_shape=SHAPES,
        in_features=list(STRIDES),
        num_classes=STUFF,
        embed_dim=WIDTH,
        width=8,
        pooler=pooler(14, ["p3"]),
    )
    flow = [L(nn.Conv2d)(in_channels=WIDTH, out_channels=WIDTH, kernel_size=1) for _ in range(2)]
    return cascade(d2ctx.HybridTaskROIHeads, mask_flow=flow, semantic=semantic)


# ---- systems ---------------------------------------------------------------------------------
def proposals() -> Any:
    return L(RPN)(
        in_features=list(STRIDES),
        head=L(StandardRPNHead)(in_channels=WIDTH, num_anchors=1),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[2 * stride] for stride in STRIDES.values()],
            aspect_ratios=[1.0],
            strides=list(STRIDES.values()),
        ),
        anchor_matcher=L(Matcher)(
            thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True
        ),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=16,
        positive_fraction=0.5,
        pre_nms_topk=[50, 50],
        post_nms_topk=[20, 20],
    )


def system(kind: Any, heads: Any, **more: Any) -> Any:
    return L(kind)(
        backbone=BACKBONES["a2fpn_lite"],
        proposal_generator=proposals(),
        roi_heads=heads,
        pixel_mean=[127.5] * 3,
        pixel_std=[64.0] * 3,
        **more,
    )


STUFF_HEAD = L(SemSegFPNHead)(
    input_shape=L(mapping)(**{name: SHAPES[name] for name in LEVELS}),
    num_classes=STUFF,
    conv_dims=WIDTH,
    common_stride=4,
    norm="",
    ignore_value=255,
)
SYSTEMS = {
    "mask_rcnn": system(d2ctx.ContextRCNN, standard()),
    "mask_rcnn_panet": system(d2ctx.ContextRCNN, panet()),
    "cascade": system(d2ctx.ContextRCNN, cascade()),
    "htc": system(d2ctx.ContextHTC, hybrid()),
    "panoptic_fpn": system(d2ctx.ContextPanopticFPN, standard(), sem_seg_head=STUFF_HEAD),
}
