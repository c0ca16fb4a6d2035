"""The product of matrices in every layout and by every library."""

import pytest
import torch

from ctxops import products
from ctxops.products import product

LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "sliced": lambda x: torch.nn.functional.pad(x, (2, 3))[:, 2:-3],
    "expanded": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("library", ["onednn", "default"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 3, 7), (1, 1, 1), (1, 4, 1), (3, 1, 2), (2, 5, 1)])
def test_product_in_any_layout(library, dtype, left, right, shape, monkeypatch):
    if library == "default":
        monkeypatch.setattr(products, "_has_onednn_linear", lambda: False)
    m, k, n = shape
    a, b = (
        LAYOUTS[left](torch.randn(m, k, dtype=dtype)),
        LAYOUTS[right](torch.randn(k, n).to(dtype)),
    )
    bias = torch.randn(n, dtype=dtype)
    expected = a.double() @ b.double()
    # Sums of at most five products of order 1.
    atol = 50 * torch.finfo(dtype).eps
    torch.testing.assert_close(product(a, b).double(), expected, rtol=0, atol=atol)
    with_bias = product(a, b, bias)
    torch.testing.assert_close(with_bias.double(), expected + bias, rtol=0, atol=atol)
    assert with_bias.is_contiguous()
