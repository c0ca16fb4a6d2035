"""Hand-written passes of the context modules against the definitions, which run in float64."""

import copy

import pytest
import torch
from torch import nn

from ctxops import ContextCollector, ContextDistributor, context_passes
from ctxops.context_passes import AttendedMeans, Distribution
from ctxops.plain import are_plain


def collector():
    return ContextCollector(in_channels=6, num_contexts=4, context_channels=5)


def distributor(**options):
    return ContextDistributor(in_channels=6, context_channels=5, out_channels=3, **options)


CASES = {
    "collector": (collector, ((2, 6, 3, 5),)),
    "collector of one pixel": (collector, ((1, 6, 1, 1),)),
    "distributor": (distributor, ((2, 6, 5, 3), (2, 5, 7))),
    "distributor, raw queries": (
        lambda: distributor(normalize_query=False),
        ((1, 6, 5, 9), (1, 5, 7)),
    ),
    "distributor of one column": (distributor, ((1, 6, 4, 1), (1, 5, 2))),
}


def results(module, inputs):
    """Output, and gradients of inputs and parameters."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = module(*leaves)
    probe = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
    grads = torch.autograd.grad(out, [*leaves, *module.parameters()], probe)
    return [out.detach(), *grads]


def assert_like_definition(module, inputs):
    found = results(module, inputs)
    expected = results(copy.deepcopy(module).double(), [x.double() for x in inputs])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("chunk_bytes", [1, context_passes.CHUNK_BYTES])
@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_definition(case, chunk_bytes, monkeypatch):
    monkeypatch.setattr(context_passes, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(context_passes, "CHUNK_MULTIPLE", 2)
    make, shapes = CASES[case]
    assert_like_definition(make(), [torch.randn(shape) for shape in shapes])


@pytest.mark.parametrize("case", ["collector", "distributor"])
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced"])
def test_layout_does_not_matter(case, layout):
    make, (shape, *others) = CASES[case]
    x = torch.randn(shape)
    changed = {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "sliced": nn.functional.pad(x, (1, 2, 3, 0))[..., 3:, 1:-2],
    }[layout]
    module, rest = make(), [torch.randn(shape) for shape in others]
    torch.testing.assert_close(results(module, [changed, *rest]), results(module, [x, *rest]))


@pytest.mark.parametrize("case", ["collector", "distributor"])
def test_zero_pixels_are_harmless(case):
    make, (shape, *others) = CASES[case]
    x = torch.randn(shape)
    x[..., 1:3] = 0.0
    module = make()
    if case == "distributor":  # a query of exactly zero
        nn.init.zeros_(module.theta.bias)
    found = results(module, [x, *(torch.randn(shape) for shape in others)])
    assert all(torch.isfinite(part).all() for part in found)


@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck_of_the_distribution(normalize, monkeypatch):
    monkeypatch.setattr(context_passes, "CHUNK_BYTES", 1)
    monkeypatch.setattr(context_passes, "CHUNK_MULTIPLE", 2)
    shapes = (2, 3, 5), (2, 4, 2), (2, 3, 4), (2, 3), (2,), (3, 3), (3,)
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(Distribution.apply, (*inputs, normalize))


def test_gradcheck_of_the_means():
    shapes = (2, 3, 5), (4, 3), (4,)
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(AttendedMeans.apply, (*inputs, 2.0))


@pytest.mark.parametrize("case", ["collector", "distributor"])
def test_a_frozen_map_gets_no_gradient(case):
    make, (shape, *others) = CASES[case]
    module, x = make(), torch.randn(shape)
    rest = [torch.randn(shape) for shape in others]
    expected = results(module, [x, *rest])[2:]
    leaves = [y.requires_grad_() for y in rest]
    out = module(x, *leaves)
    probe = torch.linspace(-1, 1, out.numel()).view_as(out)
    found = torch.autograd.grad(out, [*leaves, *module.parameters()], probe)
    torch.testing.assert_close(list(found), expected)


def test_images_of_a_batch_do_not_mix():
    module, x, contexts = distributor(), torch.randn(3, 6, 4, 5), torch.randn(3, 5, 7)
    torch.testing.assert_close(module(x, contexts)[1:2], module(x[1:2], contexts[1:2]))
    torch.testing.assert_close(collector()(x).shape, torch.Size([3, 5, 4]))
    module = collector()
    torch.testing.assert_close(module(x)[1:2], module(x[1:2]))


def test_chunks_cover_all_positions_once():
    for positions, contexts in [(1, 1), (100, 640), (10240, 640), (5000, 2**20), (33, 2**19)]:
        parts = list(context_passes._chunks(positions, contexts))
        covered = [i for part in parts for i in range(part.start, part.stop)]
        assert covered == list(range(positions))


class Other(nn.Conv2d):
    """A layer that may do anything."""


def hooked():
    layer = nn.Conv2d(2, 3, 1)
    layer.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize(
    "layer", [Other(2, 3, 1), nn.Conv2d(2, 3, 1, bias=False), nn.Identity(), hooked()]
)
def test_other_layers_are_not_passed_by(layer):
    x, usual = torch.randn(1, 2, 3, 3), nn.Conv2d(2, 3, 1)
    assert are_plain(x, usual)
    assert not are_plain(x, usual, layer)
    assert not are_plain(x.double(), usual)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not are_plain(x, usual)


def test_hooks_are_called():
    calls = []
    module = collector()
    module(torch.randn(1, 6, 3, 4))
    module.phi.register_forward_hook(lambda *_: calls.append("phi"))
    module(torch.randn(1, 6, 3, 4))
    assert calls == ["phi"]
