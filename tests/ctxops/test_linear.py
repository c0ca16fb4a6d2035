"""Linear layers by the faster library: the same numbers, gradients and graphs as `nn.Linear`."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ctxops import linear as module
from ctxops.linear import Linear, gelu_linear, linear
from ctxops.tokens import MLP

SHAPES = [(2, 5, 7, 3), (1, 1, 1, 1), (1, 9, 4, 1), (3, 1, 2, 6)]


@pytest.fixture(autouse=True)
def _always(monkeypatch):
    """Small ones as well."""
    monkeypatch.setattr(module, "MIN_MACS", 0)


def arguments(batch, rows, k, n, *, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = ((batch, rows, k), (n, k), (n,))
    return [torch.randn(*shape, dtype=dtype).requires_grad_() for shape in shapes]


def taken(function, *tensors):
    """The output, and the name of the node that made it."""
    out = function(*tensors)
    return out, type(out.grad_fn).__name__


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("ours", "plain"),
    [(linear, F.linear), (gelu_linear, lambda x, w, b=None: F.linear(F.gelu(x), w, b))],
    ids=["linear", "gelu"],
)
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_those_of_float64(ours, plain, shape, bias):
    tensors = arguments(*shape)[: 3 if bias else 2]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    out, node = taken(ours, *tensors)
    expected = plain(*exact)
    assert node == "_LinearBackward"
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)
    grad = torch.randn_like(out)
    ours_grads = torch.autograd.grad(out, tensors, grad)
    for got, wanted in zip(
        ours_grads, torch.autograd.grad(expected, exact, grad.double()), strict=True
    ):
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=5e-6)


@pytest.mark.parametrize("gelu", [False, True])
def test_layouts(gelu):
    """A slice of tokens, a transposed map and a transposed weight, none of them copied before."""
    torch.manual_seed(0)
    weight = torch.randn(6, 5).t().requires_grad_()  # [5, 6]
    for x in (torch.randn(2, 9, 6)[:, 2:-1], torch.randn(2, 6, 4).transpose(1, 2)):
        x = x.requires_grad_()
        ours = (gelu_linear if gelu else linear)(x, weight)
        plain = F.linear(F.gelu(x) if gelu else x, weight)
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)
        grad = torch.randn(2, 5, ours.shape[1]).transpose(1, 2)
        for got, wanted in zip(
            torch.autograd.grad(ours, (x, weight), grad),
            torch.autograd.grad(plain, (x, weight), grad),
            strict=True,
        ):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ours", [linear, gelu_linear])
def test_second_derivatives(ours):
    x, weight, bias = arguments(2, 3, 4, 5)
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]

    def penalty(function, x, weight, bias):
        (grad,) = torch.autograd.grad(
            function(x, weight, bias).square().sum(), x, create_graph=True
        )
        return torch.autograd.grad(grad.square().sum(), (x, weight))

    for got, wanted in zip(penalty(ours, x, weight, bias), penalty(ours, *wide), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-2)


def test_gelu_of_the_input_is_not_kept():
    x, weight, bias = arguments(1, 8, 16, 4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gelu_linear(x, weight, bias)
    assert [t.data_ptr() for t in kept] == [x.data_ptr(), weight.data_ptr()]


def test_who_takes_the_ordinary_way(monkeypatch):
    x, weight, bias = arguments(1, 8, 16, 4)
    assert taken(linear, x, weight, bias)[1] == "_LinearBackward"
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    assert taken(linear, *wide)[1] != "_LinearBackward"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, node = taken(linear, x, weight, bias)
        assert node != "_LinearBackward"
        assert out.dtype == torch.bfloat16
    monkeypatch.setattr(module, "MIN_MACS", 8 * 16 * 4 + 1)
    assert taken(linear, x, weight, bias)[1] != "_LinearBackward"
    monkeypatch.setattr(module, "MIN_MACS", 8 * 16 * 4)
    assert taken(linear, x, weight, bias)[1] == "_LinearBackward"


def test_counters_of_operators_see_ordinary_products():
    from torch.utils.flop_counter import FlopCounterMode

    layer, x = Linear(16, 4), torch.randn(1, 8, 16)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 8 * 16 * 4  # forward, and the gradient of W


def test_layer_is_an_nn_linear():
    layer = Linear(3, 2)
    assert isinstance(layer, nn.Linear)
    assert list(layer.state_dict()) == ["weight", "bias"]
    x = torch.randn(4, 3)
    torch.testing.assert_close(layer(x), nn.Linear.forward(layer, x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3)])
def test_empty_input(shape):
    assert Linear(3, 2)(torch.zeros(shape)).shape == (*shape[:-1], 2)


def test_mlp_sees_a_replaced_or_hooked_layer():
    """An adapter in the place of a layer, and a hook on its call, must not be passed by."""
    mlp = MLP(embed_dim=4, hidden_dim=8).eval()
    x, seen = torch.randn(1, 3, 4), []
    expected = mlp(x)
    handle = mlp.fc2.register_forward_hook(lambda *_: seen.append(True))
    torch.testing.assert_close(mlp(x), expected, rtol=0, atol=1e-6)
    assert seen == [True]
    handle.remove()

    class Adapter(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    mlp.fc2.__class__ = Adapter
    torch.testing.assert_close(mlp(x), expected + 1, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_compile_and_export():
    x = torch.randn(2, 40, 64)
    mlp = MLP(embed_dim=64, hidden_dim=256).eval()
    expected = mlp(x)
    compiled = torch.compile(mlp, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-5)
    exported = torch.export.export(mlp, (x,)).module()
    torch.testing.assert_close(exported(x), expected, rtol=0, atol=1e-5)
