"""Matrix products for hand-written passes, by the faster of the libraries PyTorch is built with.

`torch.mm` calls MKL for float32 on x86, which on AMD processors runs at half the speed of oneDNN
(measured: 97 against 214 GMAC/s on two cores of an EPYC with AVX-512, 2048 x 2048). PyTorch reaches
oneDNN only through the operator that its compiler uses for linear layers; where that is missing,
`torch.mm` does the same.
"""

from functools import cache

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Product of two matrices plus a bias, a @ b + bias; no autograd.

    Args:
        a: [m, k]; copied unless contiguous, so let it be the smaller one.
        b: [k, n], contiguous or the transpose of what is; copied otherwise.
        bias: [n], or None for none.

    Returns:
        A new contiguous matrix [m, n].
    """
    if a.device.type == "cpu" and a.dtype == torch.float32 and _has_onednn_linear():
        # Any other layout would be taken by a reference loop, a hundred times slower.
        weight = b.t() if b.is_contiguous() or b.t().is_contiguous() else b.t().contiguous()
        out: Tensor = torch.ops.mkldnn._linear_pointwise(a, weight, bias, "none", [], "")
        return out
    return a @ b if bias is None else torch.addmm(bias, a, b)


def is_plain_float32(*tensors: Tensor) -> bool:
    """Whether hand-written passes for float32 on a CPU may be taken.

    Args:
        *tensors: What they would work on.

    Returns:
        False inside torch.compile and torch.export, under autocast, for other dtypes, devices and
        subclasses of tensors, where oneDNN is missing, and where somebody looks at every operator,
        such as PyTorch's counter of multiplications, which does not know the hand-written ones.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    return _has_onednn_linear() and all(
        type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.dtype == torch.float32
        for x in tensors
    )


@cache
def _has_onednn_linear() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
