"""Bilinear samples as weighted rows of a table: the geometry behind `sampled_sum`.

The maps of all levels lie after each other in a table, row-major, each with a margin of two zero
pixels. A point then needs no test whether it is inside: its coordinates are clamped into the
margin, where values and derivatives are zero.

Letters: D width of a row, L levels, N points per level, P = L N, q queries, T rows of the table.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MARGIN = 2


@dataclass(frozen=True, kw_only=True)
class Level:
    """One map of the table.

    Attributes:
        shape: (H, W).
        padded: (H, W) with the margins.
        tokens: Its pixels among the pixels of all levels.
        rows: Its rows of the table, margins included.
    """

    shape: tuple[int, int]
    padded: tuple[int, int]
    tokens: slice
    rows: slice

    def pixels(self, value: Tensor) -> Tensor:
        """View [H, W, D] of the values [S, D] of all levels."""
        return value[self.tokens].unflatten(0, self.shape)

    def window(self, table: Tensor, *, down: int = 0, right: int = 0) -> Tensor:
        """View [H, W, D] of a table [T, D]: the map moved by some pixels, at most the margin."""
        height, width = self.shape
        top, left = MARGIN + down, MARGIN + right
        padded = table[self.rows].unflatten(0, self.padded)
        return padded[top : top + height, left : left + width]


@dataclass(frozen=True, kw_only=True)
class Points:
    """The sampling points of some queries, each between four pixels.

    Attributes:
        base: Row of the table of the top left pixel [q, P], int32.
        right: Distance from it to the right, in pixels [q, P].
        down: The same downwards [q, P].
        weights: Attention weights [q, P].
    """

    base: Tensor
    right: Tensor
    down: Tensor
    weights: Tensor

    def corner_weights(self) -> Tensor:
        """Attention weight times bilinear weight of each pixel [q, 2 (y), 2 (x), P]."""
        queries, points = self.base.shape
        rows = self.weights.new_empty(queries, 2, points)
        torch.mul(self.weights, self.down, out=rows[:, 1])
        torch.sub(self.weights, rows[:, 1], out=rows[:, 0])
        corners = self.weights.new_empty(queries, 2, 2, points)
        torch.mul(rows, self.right[:, None], out=corners[:, :, 1])
        torch.sub(rows, corners[:, :, 1], out=corners[:, :, 0])
        return corners


class Table:
    """Layout of the maps of all levels in one table [T, D].

    Args:
        level_shapes: L sizes (H_l, W_l).
        num_points: N.
        dtype: Floating point dtype of coordinates and weights.
        device: Of all tensors.
    """

    def __init__(
        self,
        *,
        level_shapes: Sequence[tuple[int, int]],
        num_points: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.levels = list(_place(level_shapes))
        # A row per pixel of a query at least: a sparse matrix cannot list more than its columns.
        self.num_rows = max(self.levels[-1].rows.stop, 4 * num_points * len(self.levels))
        self.dtype = dtype

        def per_point(numbers: list[int], kind: torch.dtype) -> Tensor:
            column = torch.tensor(numbers, dtype=kind, device=device)
            return column.repeat_interleave(num_points)

        self.height = per_point([level.shape[0] for level in self.levels], dtype)
        self.width = per_point([level.shape[1] for level in self.levels], dtype)
        self._lowest = torch.full_like(self.width, -MARGIN)
        self._step = per_point([level.padded[1] for level in self.levels], torch.int32)
        origins = [level.rows.start + MARGIN * (level.padded[1] + 1) for level in self.levels]
        self._origin = per_point(origins, torch.int32)
        self._first = torch.zeros_like(self._step)
        self._last = self.num_rows - 2 - self._step
        self._corners = torch.stack([self._first, self._first + 1, self._step, self._step + 1])

    def points(self, locations: Tensor, weights: Tensor) -> Points:
        """Find the pixels around the points of some queries.

        Args:
            locations: (x, y) in [0, 1] over the map, [q, L, N, 2].
            weights: [q, L, N].

        Returns:
            The points, in the dtype of this table.
        """
        flat = locations.to(self.dtype).flatten(1, 2)  # [q, P, 2]
        x = torch.clamp((flat[..., 0] * self.width).sub_(0.5), self._lowest, self.width)
        y = torch.clamp((flat[..., 1] * self.height).sub_(0.5), self._lowest, self.height)
        left, top = x.floor(), y.floor()
        base = top.to(torch.int32).mul_(self._step).add_(left.to(torch.int32)).add_(self._origin)
        return Points(
            # A location that is not a number must spoil the result, not read out of bounds.
            base=torch.clamp(base, self._first, self._last),
            right=x.sub_(left),
            down=y.sub_(top),
            weights=weights.to(self.dtype).flatten(1),
        )

    def corners_of(self, points: Points) -> Tensor:
        """Rows of the table of the four pixels of each point [q, 4, P]."""
        return points.base[:, None] + self._corners

    def gradients(self, points: Points, products: Tensor) -> tuple[Tensor, Tensor]:
        """Chain rule from the four pixels of each point to its weight and location.

        Args:
            points: The points of q queries.
            products: Gradient of the output times each pixel [q, 2 (y), 2 (x), P].

        Returns:
            Gradients [q, P] of the attention weights and [q, P, 2] of the locations.
        """
        left, right = products.unbind(2)  # [q, 2, P]
        slope_x = right - left
        at_x = torch.addcmul(left, slope_x, points.right[:, None])
        slope_y = at_x[:, 1] - at_x[:, 0]
        by_weight = torch.addcmul(at_x[:, 0], slope_y, points.down)
        by_x = torch.lerp(slope_x[:, 0], slope_x[:, 1], points.down)
        by_x.mul_(points.weights).mul_(self.width)
        by_y = slope_y.mul_(points.weights).mul_(self.height)
        return by_weight, torch.stack([by_x, by_y], dim=-1)

    def fill(self, table: Tensor, value: Tensor) -> None:
        """Write values [S, D] between the margins of a table [T, D] of zeros."""
        for level in self.levels:
            level.window(table).copy_(level.pixels(value))


def _place(level_shapes: Sequence[tuple[int, int]]) -> Iterator[Level]:
    """Levels after each other, in the list of tokens and in the table."""
    token, row = 0, 0
    for height, width in level_shapes:
        padded = height + 2 * MARGIN, width + 2 * MARGIN
        tokens = slice(token, token + height * width)
        rows = slice(row, row + padded[0] * padded[1])
        yield Level(shape=(height, width), padded=padded, tokens=tokens, rows=rows)
        token, row = tokens.stop, rows.stop
