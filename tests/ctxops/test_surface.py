"""The public surface of ctxops, and what importing it may load."""

import subprocess
import sys

import ctxops

PUBLIC = """
A2FPN ASPP AsymmetricNonLocal AtrousPyramid AugmentedConv ChannelAttention CompactNonLocal
ContentAwarePool ContentAwareUp ContextBranch ContextCollector ContextDecoder ContextDistributor
ContextEncoder ContextEncoding ConvLateral ConvNorm DeformableAttention DeformableDecoderLayer
DeformableEncoderLayer DoubleAttention DropBlock DropPath EMAttention FeaturePyramidTransformer
FiniteWatch GlobalContext GraphReasoning GridEmbedding GroundingTransformer GuidedBottomUp
GuidedTopDown KernelPredictor LinearDecoder LocalGroundingTransformer MaskTransformer
MultiLevelContext NodeAttention NodeFC NodeGraph NonFinite NonLocal ObjectContext PatchEmbedding
PointwiseLateral PoolingPyramid PyramidLateral PyramidPooling RecurrentCrissCross
RenderingTransformer Segmenter SelfTransformer SpatialBranch SqueezeExcitation SqueezeReasoning
SqueezeReasoningGate SumFusion TransformerBlock UnscathedPyramid VisionTransformer average_pool
balance_weights bin_of_angle boundary_cross_entropy boundary_mask build_a2fpn build_a2fpn_lite
build_context_branch build_fpt build_vit cell_centres count_classes count_valid cross_entropy
deformable_attention direction_cross_entropy direction_vectors flip_bins hadamard_pool
local_mixture_attention make_norm mean_over_processes mixture_attention mixture_weights
nonfinite_parameters normalize_kernels ohem_cross_entropy orthogonal_penalty pyramid_position
reassemble_down reassemble_up refine_logits refinement_offsets resize_position_embedding
scaled_cosine_attention shift_map sine_position weighted_sum
""".split()


def test_public_names():
    assert ctxops.__all__ == PUBLIC
    assert all(hasattr(ctxops, name) for name in PUBLIC)


def test_import_loads_nothing_but_torch_and_says_nothing():
    code = (
        "import sys, warnings; warnings.simplefilter('error'); import torch, torchvision; "
        "before = set(sys.modules); import ctxops; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "['ctxops']"
    assert result.stderr == ""
