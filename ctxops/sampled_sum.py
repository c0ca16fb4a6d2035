"""Deformable attention on a CPU as sums of table rows: the fast path of `deform_attention`.

A bilinear sample is a weighted sum of four pixels, so one head of one query is a sum of 4 L N rows
of a table, with weights (attention weight) * (bilinear weight). That is `embedding_bag`, whose
kernel reads rows from a table that fits the cache and never writes a sample to memory. The three
gradients are as cheap:

- weights and locations: the products of the output's gradient with the four pixels of each point,
  a sampled product of two dense matrices, then a few operations per point;
- values: the points sorted by cell, and `embedding_bag` again, from queries to cells. No two
  writes meet, so that the result is the same bit for bit in every run.

Nothing is kept for the backward pass but the arguments, and working memory is bounded.

Letters: B batch, S tokens of all levels, M heads, D width of a head, Q queries, L levels, N points
per level, P = L N, q queries of a chunk, T rows of the table (see `sampling`).
"""

import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ctxops.precision import autocast_off, widened_dtype
from ctxops.sampling import Points, Table

# Points worked on at a time: forward few enough, per thread, for the cache; backward many, because
# every chunk adds to all cells once, and not by threads, so that sums are always cut alike.
FORWARD_POINTS = 2**15
BACKWARD_POINTS = 2**18


class SampledSum(torch.autograd.Function):
    """out = sum over levels and points of weight * bilinear sample; see `deform_attention`."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        level_shapes: Sequence[tuple[int, int]],
        locations: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """[B, S, M, D], [B, Q, M, L, N, 2], [B, Q, M, L, N] -> [B, Q, M, D]."""
        ctx.save_for_backward(value, locations, weights)
        ctx.level_shapes = level_shapes
        return _sums(value, [side for shape in level_shapes for side in shape], locations, weights)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out: Tensor
    ) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
        """Gradients of the three tensors, each only where it is asked for."""
        value, locations, weights = ctx.saved_tensors
        for_value, _, for_locations, for_weights = ctx.needs_input_grad
        grad_value = torch.empty_like(value) if for_value else None
        grad_locations = torch.empty_like(locations) if for_locations else None
        grad_weights = torch.empty_like(weights) if for_weights else None
        with autocast_off(value):
            layout = _layout(value, ctx.level_shapes, locations, weights)
            for image, head, table in _tables(layout, value):
                sums = table.new_zeros(value.shape[1], value.shape[3]) if for_value else None
                for queries in _chunks(weights, BACKWARD_POINTS):
                    at = image, queries, head
                    points = layout.points(locations[at], weights[at])
                    grads = grad_out[at].to(table.dtype).contiguous()  # [q, D]
                    _add_to_pixels(sums, layout, points, grads)
                    found = _point_gradients(layout, points, grads, table, ctx.needs_input_grad)
                    _store(grad_weights, at, found[0])
                    _store(grad_locations, at, found[1])
                _store(grad_value, (image, slice(None), head), sums)
        return grad_value, None, grad_locations, grad_weights


# One operator, so that what only follows shapes need not go through thousands of small steps.
@torch.library.custom_op("ctxops::sampled_sums", mutates_args=())
def _sums(value: Tensor, level_sides: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    """[B, S, M, D], (H_1, W_1, H_2, ...), [B, Q, M, L, N, 2], [B, Q, M, L, N] -> [B, Q, M, D]."""
    level_shapes = list(zip(level_sides[::2], level_sides[1::2], strict=True))
    out = value.new_empty(*weights.shape[:3], value.shape[3])
    with autocast_off(value):
        layout = _layout(value, level_shapes, locations, weights)
        for image, head, table in _tables(layout, value):
            for queries in _chunks(weights, FORWARD_POINTS * torch.get_num_threads()):
                at = image, queries, head
                points = layout.points(locations[at], weights[at])
                out[at] = F.embedding_bag(
                    layout.corners_of(points).flatten(1),
                    table,
                    mode="sum",
                    per_sample_weights=points.corner_weights().flatten(1),
                )  # [q, D]
    return out


@_sums.register_fake
def _(value: Tensor, level_sides: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    return value.new_empty(*weights.shape[:3], value.shape[3])


def _layout(
    value: Tensor, level_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Table:
    dtype = widened_dtype(torch.promote_types(value.dtype, locations.dtype))
    return Table(
        level_shapes=level_shapes,
        num_points=weights.shape[-1],
        dtype=torch.promote_types(dtype, weights.dtype),
        device=value.device,
    )


def _tables(layout: Table, value: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(image, head, table [T, D]); the table is overwritten in the next step."""
    batch, _, heads, width = value.shape
    table = value.new_zeros(layout.num_rows, width, dtype=layout.dtype)
    for image in range(batch):
        for head in range(heads):
            layout.fill(table, value[image, :, head])
            yield image, head, table


def _chunks(weights: Tensor, num_points: int) -> Iterator[slice]:
    """Queries, so many that they have about `num_points` points in one head."""
    queries, per_query = weights.shape[1], weights.shape[3] * weights.shape[4]
    step = max(1, num_points // per_query)
    for first in range(0, queries, step):
        yield slice(first, min(first + step, queries))


def _store(target: Tensor | None, at: tuple[int, slice, int], source: Tensor | None) -> None:
    """Write a part of a gradient that may not be asked for."""
    if target is not None:
        assert source is not None, "what is asked for is computed"
        target[at] = source.view_as(target[at])


def _add_to_pixels(sums: Tensor | None, layout: Table, points: Points, grads: Tensor) -> None:
    """Add weight * grads [q, D] of every point to its four pixels, in `sums` [S, D] if wanted."""
    if sums is None:
        return
    cells, order = points.base.flatten().sort(stable=True)
    queries = order.div(points.base.shape[1], rounding_mode="floor")
    every_cell = torch.arange(layout.num_rows, dtype=cells.dtype, device=cells.device)
    first = torch.searchsorted(cells, every_cell)
    weights = points.corner_weights()  # [q, 2, 2, P]
    for down in range(2):
        for right in range(2):
            by_cell = F.embedding_bag(
                queries,
                grads,
                first,
                mode="sum",
                per_sample_weights=weights[:, down, right].flatten().take(order),
            )  # [T, D]: for the pixel so far down and right of each cell
            for level in layout.levels:
                level.pixels(sums).add_(level.window(by_cell, down=-down, right=-right))


def _point_gradients(
    layout: Table, points: Points, grads: Tensor, table: Tensor, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weights and locations from grads [q, D]; `wanted` as the arguments' order."""
    _, _, for_locations, for_weights = wanted
    if not (for_locations or for_weights):
        return None, None
    return layout.gradients(points, _pixel_products(layout, points, grads, table))


def _pixel_products(layout: Table, points: Points, grads: Tensor, table: Tensor) -> Tensor:
    """Inner products of grads [q, D] and the four pixels of every point, [q, 2, 2, P]."""
    rows = layout.corners_of(points)  # [q, 4, P]
    queries, per_query = rows.shape[0], rows[0].numel()
    starts = torch.arange(0, rows.numel() + 1, per_query, dtype=rows.dtype, device=rows.device)
    _silence_beta_notice()
    wanted = torch.sparse_csr_tensor(
        starts,
        rows.flatten(),
        grads.new_zeros(rows.numel()),
        size=(queries, layout.num_rows),
        check_invariants=False,
    )
    products = torch.sparse.sampled_addmm(wanted, grads, table.t(), beta=0.0)
    return products.values().view(queries, 2, 2, -1)


@cache
def _silence_beta_notice() -> None:
    """Spare users the notice that CSR tensors are "in beta", which comes once per process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        empty = torch.zeros(0, dtype=torch.int32)
        torch.sparse_csr_tensor(
            torch.zeros(1, dtype=torch.int32), empty, empty, size=(0, 0), check_invariants=False
        )
