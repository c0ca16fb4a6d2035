"""Context operators and necks for segmentation: PyTorch only, no configuration, no side effects."""

from ctxops.a2fpn import A2FPN, build_a2fpn, build_a2fpn_lite
from ctxops.attention import mixture_attention, mixture_weights
from ctxops.boundary import (
    bin_of_angle,
    boundary_mask,
    direction_vectors,
    flip_bins,
    refine_logits,
    refinement_offsets,
    shift_map,
)
from ctxops.channel_attention import ChannelAttention
from ctxops.context import (
    ContextCollector,
    ContextDistributor,
    MultiLevelContext,
    orthogonal_penalty,
)
from ctxops.deform_attention import DeformableAttention, deformable_attention
from ctxops.deform_layers import DeformableDecoderLayer, DeformableEncoderLayer
from ctxops.drop import DropBlock, DropPath
from ctxops.finite import FiniteWatch, NonFinite, nonfinite_parameters
from ctxops.fpt import FeaturePyramidTransformer, build_fpt
from ctxops.fusion import GuidedBottomUp, GuidedTopDown, SumFusion
from ctxops.graph import GraphReasoning
from ctxops.grounding import GroundingTransformer, LocalGroundingTransformer, SelfTransformer
from ctxops.heads.apnb import AsymmetricNonLocal
from ctxops.heads.aspp import ASPP
from ctxops.heads.augmented_conv import AugmentedConv
from ctxops.heads.compact_non_local import CompactNonLocal
from ctxops.heads.context_encoding import ContextEncoding
from ctxops.heads.criss_cross import RecurrentCrissCross
from ctxops.heads.double_attention import DoubleAttention
from ctxops.heads.em_attention import EMAttention
from ctxops.heads.global_context import GlobalContext
from ctxops.heads.non_local import NonLocal
from ctxops.heads.object_context import ObjectContext
from ctxops.heads.pyramid_pooling import PyramidPooling
from ctxops.heads.squeeze_excitation import SqueezeExcitation
from ctxops.lateral import ConvLateral, PyramidLateral
from ctxops.levels import PointwiseLateral
from ctxops.local_attention import local_mixture_attention
from ctxops.losses import (
    balance_weights,
    boundary_cross_entropy,
    count_classes,
    count_valid,
    cross_entropy,
    direction_cross_entropy,
    mean_over_processes,
    ohem_cross_entropy,
    weighted_sum,
)
from ctxops.norm import ConvNorm, make_norm
from ctxops.position import (
    GridEmbedding,
    cell_centres,
    pyramid_position,
    resize_position_embedding,
    sine_position,
)
from ctxops.reassembly import normalize_kernels, reassemble_down, reassemble_up
from ctxops.rendering import RenderingTransformer
from ctxops.resampling import ContentAwarePool, ContentAwareUp, KernelPredictor
from ctxops.segmenter import LinearDecoder, MaskTransformer, Segmenter
from ctxops.similarity import scaled_cosine_attention
from ctxops.squeeze import NodeAttention, NodeFC, NodeGraph, average_pool, hadamard_pool
from ctxops.sr import SqueezeReasoning, SqueezeReasoningGate
from ctxops.tokens import PatchEmbedding, TransformerBlock
from ctxops.unept import (
    ContextBranch,
    ContextDecoder,
    ContextEncoder,
    SpatialBranch,
    build_context_branch,
)
from ctxops.unscathed import AtrousPyramid, PoolingPyramid, UnscathedPyramid
from ctxops.vit import VisionTransformer, build_vit

__all__ = [
    "A2FPN",
    "ASPP",
    "AsymmetricNonLocal",
    "AtrousPyramid",
    "AugmentedConv",
    "ChannelAttention",
    "CompactNonLocal",
    "ContentAwarePool",
    "ContentAwareUp",
    "ContextBranch",
    "ContextCollector",
    "ContextDecoder",
    "ContextDistributor",
    "ContextEncoder",
    "ContextEncoding",
    "ConvLateral",
    "ConvNorm",
    "DeformableAttention",
    "DeformableDecoderLayer",
    "DeformableEncoderLayer",
    "DoubleAttention",
    "DropBlock",
    "DropPath",
    "EMAttention",
    "FeaturePyramidTransformer",
    "FiniteWatch",
    "GlobalContext",
    "GraphReasoning",
    "GridEmbedding",
    "GroundingTransformer",
    "GuidedBottomUp",
    "GuidedTopDown",
    "KernelPredictor",
    "LinearDecoder",
    "LocalGroundingTransformer",
    "MaskTransformer",
    "MultiLevelContext",
    "NodeAttention",
    "NodeFC",
    "NodeGraph",
    "NonFinite",
    "NonLocal",
    "ObjectContext",
    "PatchEmbedding",
    "PointwiseLateral",
    "PoolingPyramid",
    "PyramidLateral",
    "PyramidPooling",
    "RecurrentCrissCross",
    "RenderingTransformer",
    "Segmenter",
    "SelfTransformer",
    "SpatialBranch",
    "SqueezeExcitation",
    "SqueezeReasoning",
    "SqueezeReasoningGate",
    "SumFusion",
    "TransformerBlock",
    "UnscathedPyramid",
    "VisionTransformer",
    "average_pool",
    "balance_weights",
    "bin_of_angle",
    "boundary_cross_entropy",
    "boundary_mask",
    "build_a2fpn",
    "build_a2fpn_lite",
    "build_context_branch",
    "build_fpt",
    "build_vit",
    "cell_centres",
    "count_classes",
    "count_valid",
    "cross_entropy",
    "deformable_attention",
    "direction_cross_entropy",
    "direction_vectors",
    "flip_bins",
    "hadamard_pool",
    "local_mixture_attention",
    "make_norm",
    "mean_over_processes",
    "mixture_attention",
    "mixture_weights",
    "nonfinite_parameters",
    "normalize_kernels",
    "ohem_cross_entropy",
    "orthogonal_penalty",
    "pyramid_position",
    "reassemble_down",
    "reassemble_up",
    "refine_logits",
    "refinement_offsets",
    "resize_position_embedding",
    "scaled_cosine_attention",
    "shift_map",
    "sine_position",
    "weighted_sum",
]
