"""Content-aware reassembly of features: up-sampling (CARAFE form, Eq. 8) and pooling (Eq. 12).

Every output pixel is a weighted mean of a k x k window of the input, with weights of its own,
predicted from the content. The window of a tap (dy, dx), counted row-major from the top left, is
centred; outside the map there are zeros, and nothing is renormalised there.

Every function has these implementations with the same numbers:

- `loop`: the definition, tap by tap, under autograd. The reference, and slow.
- `chunked`: banded matrix products with a backward pass of its own, working memory of bounded size
  and nothing kept but the arguments (see `banded`). No second derivatives. A non-finite feature
  spreads over its tile instead of its window only.
- `triton`: fused kernels for CUDA devices (see `kernels`), without temporary memory, and without
  atomics: two runs give the same bits. No second derivatives.
- `auto`: `triton` on CUDA devices where Triton is installed, else `chunked`.

All of them work inside a torch.compile of the caller: `loop` is traced, the others are one operator
there (see `reassembly_op`). In torch.export it is always the loop, so that exported programs hold
standard operators only.

Letters: B batch, C channels, H W map, Ho Wo map of windows, k window, s scale or stride.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ctxops.checks import check_choice, check_map, check_positive
from ctxops.kernels.probe import reassembly_fits, runs_triton
from ctxops.precision import widen, widened_dtype
from ctxops.reassembly_op import reassemble
from ctxops.tiling import kernel_sides

IMPLS = ("auto", "loop", "chunked", "triton")


def normalize_kernels(logits: Tensor, *, kernel_size: int, scale: int = 1) -> Tensor:
    """Softmax over the k^2 taps of every predicted kernel.

    Channel = tap * s^2 + sub-pixel, tap = dy * k + dx, sub-pixel = s * sy + sx: the same numbers as
    a pixel shuffle to k^2 channels followed by the softmax.

    Args:
        logits: [B, k^2 s^2, Ho, Wo].
        kernel_size: k.
        scale: s; 1 for pooling.

    Returns:
        Kernels [B, k^2, s^2, Ho, Wo] that sum to 1 over axis 1, in the dtype of `logits`; the
        softmax is in at least float32.

    Raises:
        TypeError: If `logits` is not floating point.
        ValueError: If the number of channels is not k^2 s^2.
    """
    check_map(logits, "logits", channels=kernel_size**2 * scale**2)
    taps = logits.unflatten(1, (kernel_size**2, scale**2))  # [B, k^2, s^2, Ho, Wo]
    return widen(taps).softmax(1).to(logits.dtype)


def reassemble_up(x: Tensor, kernels: Tensor, *, impl: str = "auto") -> Tensor:
    """Content-aware up-sampling (A²-FPN, Eq. 8; the CARAFE operator with one group).

    out(y, x) = sum over taps of K[tap, y mod s, x mod s](y // s, x // s) * in(y // s + dy - k // 2,
    x // s + dx - k // 2), with zeros outside the map.

    Args:
        x: Coarse map [B, C, H, W].
        kernels: [B, k^2, s^2, H, W], odd k, sub-pixel = s * sy + sx; see `normalize_kernels`.
        impl: `loop`, `chunked`, `triton` or `auto`, see the head of this file.

    Returns:
        Map [B, C, s H, s W] in the dtype of `x`; sums are accumulated in at least float32.

    Raises:
        TypeError: If an argument is not floating point.
        ValueError: If the shapes do not fit together, or `impl` is unknown or cannot run there.
    """
    _check_kernels(x, kernels, stride=1)
    return _reassemble(x, kernels, 1, impl)


def reassemble_down(x: Tensor, kernels: Tensor, *, stride: int, impl: str = "auto") -> Tensor:
    """Content-aware pooling (A²-FPN, Eq. 12).

    out(y, x) = sum over taps of K[tap](y, x) * in(s y + dy - k // 2, s x + dx - k // 2), with zeros
    outside the map; the windows are those of a convolution with padding k // 2.

    Args:
        x: Fine map [B, C, H, W].
        kernels: [B, k^2, 1, Ho, Wo] with odd k, Ho = ceil(H / s), Wo = ceil(W / s); see
            `normalize_kernels`.
        stride: s.
        impl: As in `reassemble_up`.

    Returns:
        Map [B, C, Ho, Wo] in the dtype of `x`; sums are accumulated in at least float32.

    Raises:
        TypeError: If an argument is not floating point.
        ValueError: If the shapes do not fit together, or `impl` is unknown or cannot run there.
    """
    check_positive(stride, "stride")
    _check_kernels(x, kernels, stride=stride)
    if kernels.shape[2] != 1:
        raise ValueError(
            f"kernels: expected one kernel per pixel [B, k^2, 1, Ho, Wo], got "
            f"{tuple(kernels.shape)}; sub-pixels exist in up-sampling only"
        )
    return _reassemble(x, kernels, stride, impl)


def _check_kernels(x: Tensor, kernels: Tensor, *, stride: int) -> None:
    """Refuse kernels that do not fit the map."""
    check_map(x, "x")
    if not isinstance(kernels, Tensor) or not kernels.is_floating_point():
        kind = kernels.dtype if isinstance(kernels, Tensor) else type(kernels).__name__
        raise TypeError(f"kernels: expected floating point, got {kind}; use normalize_kernels")
    if kernels.dim() != 5:
        raise ValueError(
            f"kernels: expected [B, k^2, s^2, Ho, Wo], got shape {tuple(kernels.shape)}; "
            "use normalize_kernels"
        )
    size, scale = kernel_sides(kernels)
    if size**2 != kernels.shape[1] or size % 2 == 0 or scale**2 != kernels.shape[2]:
        raise ValueError(
            "kernels: expected an odd square number of taps and a square number of sub-pixels, got "
            f"{kernels.shape[1]} and {kernels.shape[2]}; use normalize_kernels"
        )
    expected = (x.shape[0], -(-x.shape[2] // stride), -(-x.shape[3] // stride))
    if (kernels.shape[0], *kernels.shape[3:]) != expected:
        raise ValueError(
            f"kernels: expected batch and size {expected} for a map {tuple(x.shape)} with stride "
            f"{stride}, got {(kernels.shape[0], *kernels.shape[3:])}; predict one kernel per window"
        )


def _reassemble(x: Tensor, kernels: Tensor, stride: int, impl: str) -> Tensor:
    """[B, C, H, W], [B, k^2, s^2, Ho, Wo] -> [B, C, s Ho, s Wo]."""
    check_choice(impl, "impl", IMPLS)
    # An exported program holds standard operators only, so that it runs wherever PyTorch runs.
    if impl == "loop" or torch.compiler.is_exporting():
        return _loop(x, kernels, stride)
    fused = runs_triton(impl, x.device, fits=reassembly_fits(x, kernels))
    return reassemble(x, kernels, stride, "triton" if fused else "chunked")


def _loop(x: Tensor, kernels: Tensor, stride: int) -> Tensor:
    """The definition, tap by tap."""
    size, scale = kernel_sides(kernels)
    height, width = kernels.shape[-2:]
    padded = F.pad(widen(x), [size // 2] * 4)
    wide_kernels = kernels.to(widened_dtype(x.dtype))
    out = torch.zeros((), dtype=padded.dtype, device=x.device)
    for tap in range(size**2):
        dy, dx = divmod(tap, size)
        rows = slice(dy, dy + (height - 1) * stride + 1, stride)
        columns = slice(dx, dx + (width - 1) * stride + 1, stride)
        window = padded[:, :, None, rows, columns]  # [B, C, 1, Ho, Wo]
        out = out + window * wide_kernels[:, None, tap]  # [B, C, s^2, Ho, Wo]
    return F.pixel_shuffle(out.flatten(1, 2), scale).to(x.dtype)
