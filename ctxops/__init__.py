"""Context operators and necks for segmentation: PyTorch only, no configuration, no side effects."""

from ctxops.a2fpn import A2FPN, build_a2fpn, build_a2fpn_lite
from ctxops.channel_attention import ChannelAttention
from ctxops.context import (
    ContextCollector,
    ContextDistributor,
    MultiLevelContext,
    orthogonal_penalty,
)
from ctxops.fusion import GuidedBottomUp, GuidedTopDown, SumFusion
from ctxops.graph import GraphReasoning
from ctxops.lateral import ConvLateral, PyramidLateral
from ctxops.reassembly import normalize_kernels, reassemble_down, reassemble_up
from ctxops.resampling import ContentAwarePool, ContentAwareUp, KernelPredictor
from ctxops.similarity import scaled_cosine_attention

__all__ = [
    "A2FPN",
    "ChannelAttention",
    "ContentAwarePool",
    "ContentAwareUp",
    "ContextCollector",
    "ContextDistributor",
    "ConvLateral",
    "GraphReasoning",
    "GuidedBottomUp",
    "GuidedTopDown",
    "KernelPredictor",
    "MultiLevelContext",
    "PyramidLateral",
    "SumFusion",
    "build_a2fpn",
    "build_a2fpn_lite",
    "normalize_kernels",
    "orthogonal_penalty",
    "reassemble_down",
    "reassemble_up",
    "scaled_cosine_attention",
]
