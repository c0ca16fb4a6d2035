"""Reassembly as one operator of PyTorch, with a backward pass of its own, for every fast path.

As a registered operator it is opaque to compilers: a graph of `torch.compile` calls the same code
as eager mode, which is faster than what a compiler makes of the loop. It has first derivatives
only: differentiating twice raises.

Letters: B batch, C channels, H W map, Ho Wo map of windows, k window, s sub-pixels per axis.
"""

from typing import Any

import torch
from torch import Tensor

from ctxops.banded import banded_backward, banded_forward, empty_gradients
from ctxops.precision import autocast_off
from ctxops.tiling import kernel_sides


@torch.library.custom_op("ctxops::reassemble", mutates_args=())
def reassemble(x: Tensor, kernels: Tensor, stride: int, impl: str) -> Tensor:
    """Sum of kernels * windows over the taps, sub-pixels put in place; see `reassembly`.

    Args:
        x: Map [B, C, H, W].
        kernels: [B, k^2, s^2, Ho, Wo].
        stride: Distance of neighbouring windows.
        impl: `chunked` or `triton`.

    Returns:
        Map [B, C, s Ho, s Wo], contiguous, in the dtype of `x`.
    """
    with autocast_off(x):
        if impl == "triton":
            from ctxops.kernels.reassembly import triton_forward

            return triton_forward(x, kernels, stride)
        return banded_forward(x, kernels, stride)


@torch.library.custom_op("ctxops::reassemble_backward", mutates_args=())
def reassemble_backward(
    grad_out: Tensor,
    x: Tensor,
    kernels: Tensor,
    stride: int,
    impl: str,
    for_x: bool,
    for_kernels: bool,
) -> list[Tensor]:
    """Gradients of both arguments, each only where it is asked for.

    Args:
        grad_out: [B, C, s Ho, s Wo].
        x: As in `reassemble`.
        kernels: As in `reassemble`.
        stride: As in `reassemble`.
        impl: As in `reassemble`.
        for_x: Whether the gradient of `x` is wanted.
        for_kernels: Whether that of the kernels is.

    Returns:
        Those asked for, in this order, each in the dtype of its argument.
    """
    with autocast_off(x):
        if impl == "triton":
            from ctxops.kernels.reassembly import triton_backward

            return triton_backward(grad_out, x, kernels, stride, for_x, for_kernels)
        return banded_backward(grad_out, x, kernels, stride, for_x, for_kernels)


@reassemble.register_fake
def _(x: Tensor, kernels: Tensor, stride: int, impl: str) -> Tensor:
    _, scale = kernel_sides(kernels)
    height, width = (extent * scale for extent in kernels.shape[-2:])
    return x.new_empty(*x.shape[:2], height, width)


@reassemble_backward.register_fake
def _(
    grad_out: Tensor,
    x: Tensor,
    kernels: Tensor,
    stride: int,
    impl: str,
    for_x: bool,
    for_kernels: bool,
) -> list[Tensor]:
    if impl == "chunked":
        return empty_gradients(x, kernels, for_x, for_kernels)
    return [t.new_empty(t.shape) for t, wanted in ((x, for_x), (kernels, for_kernels)) if wanted]


def _keep_arguments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, kernels, ctx.stride, ctx.impl = inputs
    ctx.save_for_backward(x, kernels)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    for_x, for_kernels, *_ = ctx.needs_input_grad
    found = reassemble_backward(
        grad_out, *ctx.saved_tensors, ctx.stride, ctx.impl, for_x, for_kernels
    )
    return found[0] if for_x else None, found[-1] if for_kernels else None, None, None


reassemble.register_autograd(_backward, setup_context=_keep_arguments)
