"""The public surface of ctxops, and what importing it may load."""

import subprocess
import sys

import ctxops

PUBLIC = """
A2FPN ChannelAttention ContentAwarePool ContentAwareUp ContextCollector ContextDistributor
ConvLateral GraphReasoning GuidedBottomUp GuidedTopDown KernelPredictor MultiLevelContext
PyramidLateral SumFusion build_a2fpn build_a2fpn_lite normalize_kernels orthogonal_penalty
reassemble_down reassemble_up scaled_cosine_attention
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
