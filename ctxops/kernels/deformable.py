"""Deformable attention in Triton: forward and all three gradients, without atomics.

Forward and the gradients of locations and weights gather: one program computes some queries of one
head. The gradient of the values would scatter. Instead the samples are sorted by the cell between
pixels that they fall into, and every pixel sums over those of the four cells around it. All sums
have a fixed order: two runs give the same bits. One launch per level.

Sums are in float32, or in float64 where an argument is.

Letters: B batch, Q queries, M heads, D width of a head, L levels, N points per head and level,
S tokens of all levels, H W map of a level.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ctxops.kernels.deformable_jit import forward_kernel, grad_samples_kernel, grad_value_kernel
from ctxops.precision import widened_dtype

# Queries per program; samples per step of the gradient of the values.
BLOCK_QUERIES = 16
BLOCK_SAMPLES = 16
WARPS = 4


def deformable_attention_triton(
    value: Tensor, level_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Weighted sums of bilinear samples from all levels; see `deformable_attention`.

    Args:
        value: [B, S, M, D], the levels after each other, each row-major.
        level_shapes: L sizes (H_l, W_l) with S = sum H_l W_l.
        locations: [B, Q, M, L, N, 2] as (x, y) in [0, 1].
        weights: [B, Q, M, L, N].

    Returns:
        [B, Q, M D] in the dtype of `value`. First derivatives only.
    """
    sides = [side for shape in level_shapes for side in shape]
    return _operator(value, sides, locations, weights).flatten(2)


@torch.library.custom_op("ctxops::deformable_triton", mutates_args=())
def _operator(value: Tensor, sides: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    """[B, Q, M, D]; `sides` are H_l, W_l of all levels in a row."""
    batch, _, heads, width = value.shape
    value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
    shape = batch, weights.shape[1], heads, width
    out = value.new_empty(shape, dtype=_wide(value, locations, weights))
    with torch.cuda.device_of(value):
        for level, sizes in _levels(sides, value, weights):
            forward_kernel[_grid(weights)](
                *(value, locations, weights, out, weights.shape[1], *sizes),
                FIRST=level == 0,
                **_options(value, locations, weights),
            )
    return out.to(value.dtype)


@torch.library.custom_op("ctxops::deformable_triton_backward", mutates_args=())
def _backward_operator(
    grad_out: Tensor,
    value: Tensor,
    sides: list[int],
    locations: Tensor,
    weights: Tensor,
    for_value: bool,
    for_samples: bool,
) -> list[Tensor]:
    """Gradient of the values, then those of locations and weights, where asked for."""
    grad_out, value = grad_out.contiguous(), value.contiguous()
    locations, weights = locations.contiguous(), weights.contiguous()
    found = [torch.empty_like(value)] if for_value else []
    found += [torch.empty_like(locations), torch.empty_like(weights)] if for_samples else []
    options = _options(value, locations, weights)
    with torch.cuda.device_of(value):
        for level, sizes in _levels(sides, value, weights):
            if for_samples:
                grad_samples_kernel[_grid(weights)](
                    *(grad_out, value, locations, weights, *found[-2:]),
                    *(weights.shape[1], *sizes),
                    **options,
                )
            if for_value:
                order, starts = _sorted_samples(
                    locations[:, :, :, level].to(_wide(value, locations, weights)), sizes[-2:]
                )
                grad_value_kernel[(value.shape[0] * value.shape[2] * sizes[-2] * sizes[-1],)](
                    *(grad_out, locations, weights, order, starts, found[0], *sizes),
                    BLOCK_E=BLOCK_SAMPLES,
                    BLOCK_D=options["BLOCK_D"],
                    SUM=options["SUM"],
                    num_warps=1,
                    enable_fp_fusion=True,
                )
    return found


def _sorted_samples(locations: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Samples [B, Q, M, N, 2] of a level in the order of their cells, and where each cell starts.

    Samples outside all cells come last, and no cell has them.
    """
    batch, _, heads = locations.shape[:3]
    rows, columns = shape
    column = (locations[..., 0] * columns + 0.5).floor()
    row = (locations[..., 1] * rows + 0.5).floor()
    inside = (column >= 0) & (column <= columns) & (row >= 0) & (row <= rows)
    image = torch.arange(batch, device=locations.device).view(-1, 1, 1, 1)
    head = torch.arange(heads, device=locations.device).view(1, 1, -1, 1)
    cells = batch * heads * (rows + 1) * (columns + 1)
    # Whole numbers from here on: float32 does not hold every cell of a large batch.
    row, column = (torch.where(inside, axis, 0).long() for axis in (row, column))
    cell = ((image * heads + head) * (rows + 1) + row) * (columns + 1) + column
    cell = torch.where(inside, cell, cells).int().flatten()
    ordered, order = cell.sort(stable=True)
    numbers = torch.arange(cells + 1, device=cell.device, dtype=torch.int32)
    return order.int(), torch.searchsorted(ordered, numbers, out_int32=True)


def _levels(
    sides: list[int], value: Tensor, weights: Tensor
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Index and (M, D, N, S, L N, l, first token, H, W) of every level."""
    _, tokens, heads, width = value.shape
    levels, points = weights.shape[3:]
    start = 0
    for level in range(levels):
        rows, columns = sides[2 * level : 2 * level + 2]
        yield level, (heads, width, points, tokens, levels * points, level, start, rows, columns)
        start += rows * columns


def _grid(weights: Tensor) -> tuple[int]:
    batch, queries, heads = weights.shape[:3]
    return (batch * heads * triton.cdiv(queries, BLOCK_QUERIES),)


def _options(*tensors: Tensor) -> dict[str, Any]:
    return {
        "BLOCK_Q": BLOCK_QUERIES,
        "BLOCK_D": triton.next_power_of_2(tensors[0].shape[3]),
        "SUM": tl.float64 if _wide(*tensors) == torch.float64 else tl.float32,
        "num_warps": WARPS,
        "enable_fp_fusion": True,
    }


def _wide(value: Tensor, locations: Tensor, weights: Tensor) -> torch.dtype:
    """The dtype to compute in."""
    dtype = torch.promote_types(value.dtype, locations.dtype)
    return widened_dtype(torch.promote_types(dtype, weights.dtype))


@_operator.register_fake
def _(value: Tensor, sides: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    return value.new_empty(value.shape[0], weights.shape[1], *value.shape[2:])


@_backward_operator.register_fake
def _(
    grad_out: Tensor,
    value: Tensor,
    sides: list[int],
    locations: Tensor,
    weights: Tensor,
    for_value: bool,
    for_samples: bool,
) -> list[Tensor]:
    wanted = [value] * for_value + [locations, weights] * for_samples
    return [argument.new_empty(argument.shape) for argument in wanted]


def _keep_arguments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.sides, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    value, locations, weights = ctx.saved_tensors
    for_value, _, *for_samples = ctx.needs_input_grad
    found = _backward_operator(
        grad_out, value, ctx.sides, locations, weights, for_value, any(for_samples)
    )
    grad_locations, grad_weights = found[-2:] if any(for_samples) else (None, None)
    return found[0] if for_value else None, None, grad_locations, grad_weights


_operator.register_autograd(_backward, setup_context=_keep_arguments)
