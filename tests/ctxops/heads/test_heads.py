"""What holds for every comparison head: equation, size, gradients, layouts, precision, errors."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ctxops.heads.apnb import AsymmetricNonLocal
from ctxops.heads.aspp import ASPP
from ctxops.heads.compact_non_local import CompactNonLocal
from ctxops.heads.context_encoding import ContextEncoding
from ctxops.heads.criss_cross import RecurrentCrissCross
from ctxops.heads.double_attention import DoubleAttention
from ctxops.heads.em_attention import EMAttention
from ctxops.heads.non_local import NonLocal
from ctxops.heads.object_context import ObjectContext
from ctxops.heads.pyramid_pooling import PyramidPooling
from ctxops.heads.squeeze_excitation import SqueezeExcitation
from tests.ctxops.test_squeeze import count, randomized
from tests.oracles import heads as oracle

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@dataclass(frozen=True)
class Head:
    """A small instance of a head, its loop, and its output width."""

    build: Any
    loop: Any
    out_channels: int = 8


HEADS = {
    "se": Head(partial(SqueezeExcitation, reduction=4), oracle.squeeze_excitation),
    "nl": Head(NonLocal, oracle.non_local),
    "nl_literal": Head(
        partial(NonLocal, scaled=False, norm=""), partial(oracle.non_local, scaled=False)
    ),
    "a2": Head(partial(DoubleAttention, num_descriptors=3), oracle.double_attention),
    "cgnl": Head(partial(CompactNonLocal, groups=2), partial(oracle.compact_non_local, groups=2)),
    "emau": Head(
        partial(EMAttention, num_bases=3),
        lambda x, state: oracle.em_attention(x, state, iterations=3)[0],
    ),
    "rcca": Head(partial(RecurrentCrissCross, reduction=4), oracle.criss_cross),
    "oc": Head(partial(ObjectContext, out_channels=6), oracle.object_context, 6),
    "apnb": Head(
        partial(AsymmetricNonLocal, sizes=(1, 2)),
        partial(oracle.asymmetric_non_local, sizes=(1, 2)),
    ),
    "psp": Head(
        partial(PyramidPooling, out_channels=6, bins=(1, 2, 3), bin_channels=2),
        partial(oracle.pyramid_pooling, bins=(1, 2, 3)),
        6,
    ),
    "psp_light": Head(
        partial(
            PyramidPooling,
            out_channels=6,
            bins=(2, 4),
            bin_act=False,
            kernel_size=1,
            align_corners=True,
        ),
        partial(oracle.pyramid_pooling, bins=(2, 4), act=False, align_corners=True),
        6,
    ),
    "aspp": Head(
        partial(ASPP, out_channels=6, dilations=(1, 2)), partial(oracle.aspp, dilations=(1, 2)), 6
    ),
    "encoding": Head(partial(ContextEncoding, num_codewords=3), oracle.context_encoding),
}
every_head = pytest.mark.parametrize("name", HEADS)


def make(name, **options):
    return HEADS[name].build(in_channels=8, **options)


def moderate(module):
    """Random weights that leave softmaxes soft and no branch at its zero start."""
    module = randomized(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.4)
    return module


@every_head
@pytest.mark.parametrize("size", [(3, 5), (1, 1), (4, 1), (1, 3)])
def test_equals_the_equation(name, size):
    module = moderate(make(name))
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    state = module.state_dict()
    expected = torch.stack([HEADS[name].loop(image, state) for image in x])
    assert expected.shape == (2, HEADS[name].out_channels, *size)
    torch.testing.assert_close(module(x), expected, **CLOSE)


# The bases of EM are constants to autograd, by design: see its own test.
@pytest.mark.parametrize("name", [name for name in HEADS if name != "emau"])
def test_gradcheck(name):
    module = moderate(make(name))
    x = torch.randn(1, 8, 3, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, HEADS[name].out_channels, 3, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: (module(x) * weight).sum(), x)


@every_head
def test_images_of_a_batch_do_not_mix(name):
    module = moderate(make(name))
    x = torch.randn(3, 8, 4, 5, dtype=torch.float64)
    alone = torch.cat([module(image[None]) for image in x])
    torch.testing.assert_close(module(x), alone, **CLOSE)


@every_head
@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
def test_memory_layout_does_not_matter(name, layout):
    module = moderate(make(name))
    x = torch.randn(2, 8, 4, 6, dtype=torch.float64)
    last = x.to(memory_format=torch.channels_last)
    laid_out = last if layout == "channels_last" else F.pad(x, [1, 2, 3, 4])[..., 3:-4, 1:-2]
    torch.testing.assert_close(module(laid_out), module(x), **CLOSE)


@every_head
def test_one_training_step_reaches_every_parameter(name):
    module = moderate(make(name)).float().train()
    x = torch.randn(3, 8, 5, 6, requires_grad=True)
    module(x).square().sum().backward()
    idle = [k for k, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle
    assert x.grad.isfinite().all()


@every_head
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_trains_and_keeps_the_dtype(name, dtype):
    module = moderate(make(name)).float()
    x = torch.randn(2, 8, 5, 6).to(dtype).requires_grad_()
    expected = module(x.detach().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype == dtype
    # bfloat16 has 8 bits; a few roundings in a row.
    assert (out.float() - expected).norm() < 0.05 * expected.norm()
    module.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module(x).float().square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@every_head
def test_says_what_is_wrong_with_the_map(name):
    module = make(name)
    with pytest.raises(ValueError, match="x: expected 8 channels, got 7"):
        module(torch.zeros(1, 7, 4, 4))
    with pytest.raises(ValueError, match="a single image needs a batch axis"):
        module(torch.zeros(8, 4, 4))
    with pytest.raises(TypeError, match="x: expected a floating point map, got torch.int64"):
        module(torch.zeros(1, 8, 4, 4).long())


@pytest.mark.parametrize("name", ["nl", "a2", "emau", "oc", "apnb", "psp", "aspp"])
def test_every_norm_by_name(name):
    for norm in ("SyncBN", "GN", ""):
        head = HEADS[name].build
        wide = partial(head.func if isinstance(head, partial) else head, in_channels=64, norm=norm)
        options = {"psp": {"out_channels": 64, "bin_channels": 64}, "aspp": {"out_channels": 64}}
        out = wide(**options.get(name, {})).eval()(torch.randn(1, 64, 3, 4))
        assert out.shape == (1, 64, 3, 4)
    with pytest.raises(ValueError, match="norm: expected one of .* got 'IN'"):
        make(name, norm="IN")


PAPER = [
    (SqueezeExcitation(in_channels=512), 32_768),
    (NonLocal(in_channels=512), 525_312),
    (DoubleAttention(in_channels=512), 525_312),
    (DoubleAttention(in_channels=512, num_descriptors=128, norm=""), 393_216),
    (CompactNonLocal(in_channels=512), 410_624),
    (EMAttention(in_channels=512), 525_824),
    (RecurrentCrissCross(in_channels=512), 328_321),
    (ContextEncoding(in_channels=512), 542_304),
    (AsymmetricNonLocal(in_channels=512), 394_752),
    # 394 752 as above, a 1x1 convolution 1024 -> 512 with bias, a norm.
    (ObjectContext(in_channels=512), 394_752 + 524_288 + 512 + 1_024),
]


@pytest.mark.parametrize(("module", "expected"), PAPER, ids=lambda v: type(v).__name__)
def test_parameters_at_512_channels(module, expected):
    assert count(module) == expected


def test_parameters_at_2048_channels():
    with torch.device("meta"):
        psp = PyramidPooling(in_channels=2048, out_channels=512)
        aspp = ASPP(in_channels=2048)
    assert count(psp) == 23_073_792
    assert count(aspp) == 15_535_104


def test_parameters_of_the_light_pyramid():
    light = PyramidPooling(
        in_channels=512, out_channels=128, bin_channels=128, bin_act=False, kernel_size=1
    )
    assert count(light) == 394_496


NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
ATTENTION = ["key.conv.weight", "key.conv.bias", *[f"key.norm.{n}" for n in NORM],
             "value.weight", "value.bias", "out.weight", "out.bias"]  # fmt: skip
FUSE = ["fuse.conv.weight", *[f"fuse.norm.{n}" for n in NORM]]
NAMES = {
    "se": ["reduce.weight", "expand.weight"],
    "nl_literal": ["query.weight", "key.weight", "value.weight", "out.weight"],
    "cgnl": ["theta.weight", "phi.weight", "g.weight", "out.weight", "norm.weight", "norm.bias"],
    "emau": ["bases", "inner.weight", "inner.bias", "out.weight", *[f"norm.{n}" for n in NORM]],
    "rcca": ["gamma", *[f"{p}.{k}" for p in ("query", "key", "value") for k in ("weight", "bias")]],
    "apnb": [f"attention.{n}" for n in ATTENTION],
    "oc": [*[f"attention.{n}" for n in ATTENTION], *FUSE, "fuse.conv.bias"],
    "psp_light": [
        *[f"bins.{b}.{n}" for b in (2, 4) for n in ("conv.weight", *[f"norm.{k}" for k in NORM])],
        *FUSE,
    ],
    "aspp": [
        *[
            f"{b}.{n}"
            for b in ("pointwise", "dilated.1", "dilated.2", "image")
            for n in ("conv.weight", *[f"norm.{k}" for k in NORM])
        ],
        *FUSE,
    ],
    "encoding": [
        "codewords", "scales", "features.conv.weight", *[f"features.norm.{n}" for n in NORM],
        *[f"norm.{n}" for n in NORM], "gate.weight", "gate.bias",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_in_the_state(name):
    assert set(make(name).state_dict()) == set(NAMES[name])


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (partial(SqueezeExcitation, reduction=3), ValueError, "reduction and in_channels: .* 3"),
        (partial(NonLocal, reduction=3), ValueError, "reduction and in_channels: .* 3 and 8"),
        (partial(CompactNonLocal, groups=3), ValueError, "groups and reduced channels: .* 3 and 4"),
        (partial(DoubleAttention, num_descriptors=0), ValueError, "num_descriptors: .* got 0"),
        (partial(DoubleAttention, descriptor_channels=2.5), TypeError, "descriptor_channels: "),
        (partial(EMAttention, num_iterations=0), ValueError, "num_iterations: .* got 0"),
        (partial(EMAttention, momentum=1.0), ValueError, r"momentum: .* \[0, 1\), got 1.0"),
        (partial(RecurrentCrissCross, num_recurrences=0), ValueError, "num_recurrences: .* got 0"),
        (partial(ObjectContext, dropout=1), ValueError, "dropout: expected a probability"),
        (partial(AsymmetricNonLocal, sizes=()), ValueError, "sizes: expected at least one"),
        (partial(AsymmetricNonLocal, sizes=(0,)), ValueError, "sizes: .* got 0"),
        (partial(PyramidPooling, out_channels=4, bins=()), ValueError, "number of bins: .* got 0"),
        (partial(PyramidPooling, out_channels=4, kernel_size=2), ValueError, "odd size, got 2"),
        (partial(ASPP, dilations=(0,)), ValueError, "dilations: .* got 0"),
        (partial(ContextEncoding, norm="GN"), ValueError, "GN"),
    ],
)  # fmt: skip
def test_says_what_is_wrong_with_the_options(build, error, text):
    with pytest.raises(error, match=text):
        build(in_channels=8)


@pytest.mark.slow
@every_head
def test_compile_and_export_give_the_same_numbers(name):
    torch.compiler.reset()
    module = moderate(make(name)).float()
    x = torch.randn(2, 8, 5, 6)
    expected = module(x)
    exported = torch.export.export(module, (x,)).module()(x)
    torch.testing.assert_close(exported, expected, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(module, fullgraph=True)(x)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)
    torch.compile(module.train(), fullgraph=True)(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    if name == "emau":
        module.update_bases()


@pytest.mark.gpu
@every_head
def test_gpu_equals_cpu(name):
    module = moderate(make(name))
    x = torch.randn(2, 8, 13, 9, dtype=torch.float64)
    expected = module(x)
    torch.testing.assert_close(module.cuda()(x.cuda()).cpu(), expected, **CLOSE)


@pytest.mark.gpu
@every_head
def test_gpu_autocast_keeps_the_dtype(name):
    module = moderate(make(name)).float().cuda().train()
    x = torch.randn(2, 8, 13, 9, device="cuda").half().requires_grad_()
    with torch.autocast("cuda", dtype=torch.float16):
        out = module(x)
    assert out.dtype == torch.float16
    out.float().square().mean().backward()
    assert x.grad.isfinite().all()
