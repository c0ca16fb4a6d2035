"""Resizing: PyTorch's numbers, and a backward pass by matrices that gives the same gradient."""

import pytest
import torch
import torch.nn.functional as F

from ctxops import resize
from ctxops.resize import resize_bilinear

SIZES = [((3, 4), (12, 16)), ((5, 2), (7, 9)), ((1, 1), (4, 3)), ((1, 6), (1, 6)), ((2, 3), (2, 8))]


@pytest.fixture(autouse=True)
def _always(monkeypatch):
    """Small maps as well."""
    monkeypatch.setattr(resize, "FEWEST_BY_MATRIX", 0)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("old", "new"), SIZES)
def test_enlarging(old, new, align_corners):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *old, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    out = resize_bilinear(x, new, align_corners=align_corners)
    assert type(out.grad_fn).__name__ == "_EnlargeBackward"
    keywords = {"size": new, "mode": "bilinear", "align_corners": align_corners}
    assert torch.equal(out, F.interpolate(x, **keywords))
    grad = torch.randn_like(out)
    (ours,) = torch.autograd.grad(out, x, grad)
    (expected,) = torch.autograd.grad(F.interpolate(wide, **keywords), wide, grad.double())
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=5e-6)


def test_gradients_in_any_layout():
    """Of a crop, and with the channels last."""
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    for change in (
        lambda y: y[:, :, :7, 1:],
        lambda y: y.to(memory_format=torch.channels_last),
        lambda y: y.sum(),
    ):
        ours = torch.autograd.grad(
            change(resize_bilinear(x, (8, 9), align_corners=False)).square().sum(), x
        )[0]
        plain = F.interpolate(x, size=(8, 9), mode="bilinear", align_corners=False)
        expected = torch.autograd.grad(change(plain).square().sum(), x)[0]
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


def test_second_derivative():
    x = torch.randn(1, 2, 3, 3, requires_grad=True)

    def penalty(y):
        (grad,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    ours = penalty(resize_bilinear(x, (6, 5), align_corners=False))
    expected = penalty(F.interpolate(x, size=(6, 5), mode="bilinear", align_corners=False))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)


def test_who_takes_the_ordinary_way(monkeypatch):
    def node(x, size=(8, 8)):
        return type(resize_bilinear(x, size, align_corners=False).grad_fn).__name__

    x = torch.randn(1, 4, 4, 4, requires_grad=True)
    assert node(x) == "_EnlargeBackward"
    assert node(x, (3, 8)) != "_EnlargeBackward"
    assert node(x.double()) != "_EnlargeBackward"
    assert node(x.to(memory_format=torch.channels_last)) != "_EnlargeBackward"
    with torch.no_grad():
        assert resize_bilinear(x, (8, 8), align_corners=False).grad_fn is None
    monkeypatch.setattr(resize, "WIDEST_BY_MATRIX", 3)
    assert node(x) != "_EnlargeBackward"
