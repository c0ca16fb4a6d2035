"""Dropout of elements: what it draws, what it scales, its gradients, and what it keeps."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ctxops.dropout import dropout, relu_dropout

RATES = [0.1, 0.5, 0.9]
FORMS = [dropout, relu_dropout]


def kept_bytes(call, *known):
    """Bytes of the storages that a forward pass keeps, but for those of `known` and the result."""
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = call()
    for x in (*known, out):
        kept.pop(x.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def seeded(form, p):
    def run(x):
        torch.manual_seed(3)
        return form(x, p, training=True)

    return run


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_relu_dropout_equals_pytorchs_two_steps(layout, p):
    whole = torch.randn(6, 7, 10)
    x = {"contiguous": whole, "transposed": whole.transpose(1, 2), "sliced": whole[:, 1:, ::2]}
    ours, theirs = (x[layout].detach().requires_grad_() for _ in range(2))
    torch.manual_seed(3)
    expected = F.dropout(theirs.relu(), p)
    out = seeded(relu_dropout, p)(ours)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad)
    assert torch.equal(out, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("p", RATES)
def test_dropout_scales_what_it_leaves(p):
    x = torch.ones(200, 500, requires_grad=True)
    out = dropout(x, p, training=True)
    out.sum().backward()
    left = out > 0
    torch.testing.assert_close(out[left], torch.full_like(out[left], 1 / (1 - p)))
    assert (out[~left] == 0).all()
    assert left.float().mean().item() == pytest.approx(1 - p, abs=0.01)
    torch.testing.assert_close(x.grad, out.detach())
    assert not torch.equal(dropout(x, p, training=True), out)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_of_both_orders(form):
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(seeded(form, 0.4), (x,))
    assert torch.autograd.gradgradcheck(seeded(form, 0.4), (x,))


def test_dropout_keeps_a_byte_per_element():
    x = torch.randn(64, 32, requires_grad=True)
    assert kept_bytes(lambda: dropout(x, 0.5, training=True), x) == x.numel()


def test_relu_dropout_keeps_its_result_alone():
    x = torch.randn(64, 32, requires_grad=True)
    assert kept_bytes(lambda: relu_dropout(x, 0.5, training=True), x) == 0
    assert kept_bytes(lambda: F.dropout(x.relu(), 0.5), x) > 4 * x.numel()


@pytest.mark.parametrize(("p", "training"), [(0.5, False), (0.0, True), (0.0, False)])
def test_nothing_is_drawn_in_evaluation_or_at_rate_0(p, training):
    x = torch.randn(3, 4)
    state = torch.get_rng_state()
    assert dropout(x, p, training=training) is x
    assert torch.equal(relu_dropout(x, p, training=training), x.relu())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_stay(form, dtype):
    x = torch.randn(8, 9, dtype=dtype, requires_grad=True)
    out = form(x, 0.3, training=True)
    out.sum().backward()
    assert out.dtype == x.grad.dtype == dtype
    assert torch.equal(x.grad != 0, out != 0)


@pytest.mark.parametrize("form", FORMS)
def test_after_a_layer_in_bfloat16_autocast(form):
    layer = nn.Linear(16, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = form(layer(torch.randn(5, 16)), 0.5, training=True)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_an_empty_tensor_stays_empty(form):
    assert form(torch.empty(0, 4), 0.5, training=True).shape == (0, 4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("p", [-0.1, 1.0, 2.0])
def test_refuses_what_is_no_probability(form, p):
    with pytest.raises(ValueError, match=r"p: expected a probability in \[0, 1\)"):
        form(torch.randn(2, 2), p, training=True)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_compiles_and_exports_in_one_graph(form):
    class Part(nn.Module):
        def forward(self, x):
            return form(x, 0.5, training=self.training)

    x = torch.rand(64, 64) + 1
    out = torch.compile(Part(), fullgraph=True)(x)
    left = out > 0
    torch.testing.assert_close(out[left], 2 * x[left])
    assert 0.4 < left.float().mean() < 0.6
    part = Part().eval()
    exported = torch.export.export(part, (x,)).module()
    torch.testing.assert_close(exported(x), part(x))
