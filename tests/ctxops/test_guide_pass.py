"""The guided steps without a guide, against the definition, which runs in float64."""

import copy

import pytest
import torch
from torch import nn

from ctxops import (
    ChannelAttention,
    ContentAwarePool,
    ContentAwareUp,
    GuidedBottomUp,
    GuidedTopDown,
    KernelPredictor,
    fusion,
)
from ctxops.guide_pass import GuidePass

WIDTH = 4


def step(kind):
    top_down = kind == "top down"
    sides = {"scale": 2} if top_down else {"stride": 2}
    predictor = KernelPredictor(in_channels=2 * WIDTH, kernel_size=3, reduction_channels=6, **sides)
    nn.init.normal_(predictor.predict.weight)  # the tiny initial weights would hide mistakes
    resample = (ContentAwareUp if top_down else ContentAwarePool)(predictor=predictor)
    attention = ChannelAttention(in_channels=2 * WIDTH, hidden_channels=3)
    return (GuidedTopDown if top_down else GuidedBottomUp)(resample=resample, attention=attention)


def maps(kind, size, batch=2):
    coarse = tuple(-(-extent // 2) for extent in size)
    sizes = (coarse, size) if kind == "top down" else (size, coarse)
    return [torch.randn(batch, WIDTH, *s) for s in sizes]


def results(module, inputs):
    """Output, and gradients of inputs and parameters."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = module(*leaves)
    probe = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [*leaves, *module.parameters()], probe)]


@pytest.mark.parametrize("kind", ["top down", "bottom up"])
@pytest.mark.parametrize("size", [(6, 8), (7, 5), (1, 1), (1, 6), (5, 1)])
def test_equal_to_the_definition(kind, size):
    module, inputs = step(kind), maps(kind, size)
    expected = results(copy.deepcopy(module).double(), [x.double() for x in inputs])
    for ours, theirs in zip(results(module, inputs), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("second", [(3, 4), (2, 2), (2, 3)])
def test_gradcheck(second):
    shapes = (2, 2, 3, 4), (2, 2, *second), (4, 4), (4,)
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(GuidePass.apply, inputs)


@pytest.mark.parametrize("kind", ["top down", "bottom up"])
def test_layout_does_not_matter(kind):
    module, inputs = step(kind), maps(kind, (6, 7))
    changed = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
    torch.testing.assert_close(results(module, changed), results(module, inputs))


@pytest.mark.parametrize("kind", ["top down", "bottom up"])
def test_images_of_a_batch_do_not_mix(kind):
    module, inputs = step(kind), maps(kind, (6, 7), batch=3)
    alone = module(*(x[1:2] for x in inputs))
    torch.testing.assert_close(module(*inputs)[1:2], alone, rtol=1e-4, atol=1e-5)


def parts(module):
    predictor, attention = module.resample.predictor, module.attention
    return [module.resample, predictor, predictor.reduce, attention, attention.mask]


@pytest.mark.parametrize("kind", ["top down", "bottom up"])
@pytest.mark.parametrize("index", range(5))
def test_whoever_listens_gets_the_definition(kind, index, monkeypatch):
    module, inputs, calls = step(kind), maps(kind, (6, 8)), []
    expected = module(*inputs)
    monkeypatch.setattr(fusion, "_by_pass", lambda *_: pytest.fail("took the pass"))
    parts(module)[index].register_forward_hook(lambda *_: calls.append(index))
    torch.testing.assert_close(module(*inputs), expected, rtol=1e-4, atol=1e-5)
    assert calls == [index]


@pytest.mark.parametrize("kind", ["top down", "bottom up"])
def test_other_parts_get_the_definition(kind, monkeypatch):
    class Twice(ChannelAttention):
        def forward(self, x):
            return 2 * super().forward(x)

    module, inputs = step(kind), maps(kind, (6, 8))
    before = module(*inputs)
    weights = module.attention.state_dict()
    module.attention = Twice(in_channels=2 * WIDTH, hidden_channels=3)
    module.attention.load_state_dict(weights)
    torch.testing.assert_close(module(*inputs), 2 * before, rtol=1e-4, atol=1e-5)
