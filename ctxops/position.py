"""Positions of tokens: sine encodings, learnt tables on a grid, and their resizing to other grids.

Tokens of a grid are row-major: token t of a grid (h, w) is the cell (t // w, t % w). Points are
(x, y) in [0, 1] over the map, (0, 0) its top left corner, ((j + 0.5) / w, (i + 0.5) / h) the centre
of cell (i, j).

Letters: B batch, P prefix tokens, L levels, S tokens of all levels, Q queries, d width, h w grid.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxops.checks import check_choice, check_positive
from ctxops.precision import widen

RESIZE_MODES = ("bilinear", "bicubic")
TEMPERATURE = 10_000.0
# Keeps the normalised index below 2 pi, as the published models were trained.
EXTENT_EPS = 1e-6


def check_grid(grid: tuple[int, int], name: str) -> None:
    """Refuse anything but two positive integers.

    Args:
        grid: (h, w).
        name: What the caller calls it.

    Raises:
        TypeError: If a side is not an integer.
        ValueError: If there are not two sides, or one is not positive.
    """
    if len(grid) != 2:
        raise ValueError(f"{name}: expected (height, width), got {tuple(grid)}; pass two sizes")
    for side in grid:
        # torch.export hands in symbols, which are no `int`.
        if not isinstance(side, torch.SymInt):
            check_positive(side, name)


def resize_position_embedding(
    embedding: Tensor,
    *,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    num_prefix: int,
    mode: str = "bilinear",
) -> Tensor:
    """Position embeddings of a grid of patches, resampled to another grid (Segmenter, Sec. 4.1).

    Edges of the two grids are matched (`align_corners` False), without antialiasing. The grids are
    compared, never the numbers of tokens: 16 x 64 has as many as 32 x 32.

    Args:
        embedding: [1, P + h w, d], the prefix (class, distillation) first.
        old_grid: (h, w) of `embedding`.
        new_grid: (h', w') wanted.
        num_prefix: P; these rows are handed through.
        mode: `bilinear` or `bicubic`.

    Returns:
        [1, P + h' w', d] in the dtype of `embedding`; `embedding` itself where the grids are equal.

    Raises:
        TypeError: If a side of a grid is not an integer.
        ValueError: If a side is not positive, the number of tokens is not P + h w, or `mode` is
            unknown.
    """
    check_choice(mode, "mode", RESIZE_MODES)
    check_grid(old_grid, "old_grid")
    check_grid(new_grid, "new_grid")
    height, width = old_grid
    if embedding.dim() != 3 or embedding.shape[1] != num_prefix + height * width:
        raise ValueError(
            f"embedding: expected [1, {num_prefix} + {height} * {width}, d] for the grid "
            f"{(height, width)}, got {tuple(embedding.shape)}; pass the grid it was made for"
        )
    if tuple(old_grid) == tuple(new_grid):
        return embedding
    cells = embedding[:, num_prefix:].unflatten(1, (height, width))  # [1, h, w, d]
    resized = F.interpolate(
        widen(cells).permute(0, 3, 1, 2),
        size=list(new_grid),
        mode=mode,
        align_corners=False,
        antialias=False,
    )  # [1, d, h', w']
    tokens = resized.flatten(2).transpose(1, 2).to(embedding.dtype)
    return torch.cat([embedding[:, :num_prefix], tokens], dim=1)


def sine_position(
    grid: tuple[int, int],
    channels: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Fixed sine encoding of a grid (UN-EPT, Sec. 3.1.1): d / 2 features of y, then d / 2 of x.

    Feature i of row r = 1..h of an axis is sin (even i) or cos (odd i) of
    2 pi r / (h + 1e-6) / 10000^(2 floor(i / 2) / (d / 2)).

    Args:
        grid: (h, w).
        channels: d, a multiple of 4.
        dtype: Of the result; it is computed in at least float32.
        device: Of the result.

    Returns:
        [h w, d].

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is not positive or 4 does not divide d.
    """
    check_grid(grid, "grid")
    check_positive(channels, "channels")
    if channels % 4:
        raise ValueError(
            f"channels: expected a multiple of 4 (sin and cos of two axes), got {channels}; "
            f"use {channels - channels % 4 + 4}"
        )
    height, width = grid
    wide = torch.promote_types(dtype, torch.float32)
    rows = _axis_waves(height, channels // 2, wide, device)
    columns = _axis_waves(width, channels // 2, wide, device)
    waves = torch.cat(
        [
            rows[:, None].expand(-1, width, -1),
            columns[None].expand(height, -1, -1),
        ],
        dim=-1,
    )  # [h, w, d]
    return waves.flatten(0, 1).to(dtype)


def _axis_waves(
    extent: int, features: int, dtype: torch.dtype, device: torch.device | str | None
) -> Tensor:
    """[extent, features] of one axis."""
    index = torch.arange(1, extent + 1, dtype=dtype, device=device)
    angle = index / (extent + EXTENT_EPS) * (2 * math.pi)
    exponent = torch.arange(features // 2, dtype=dtype, device=device) * (2 / features)
    phase = angle[:, None] / TEMPERATURE**exponent  # [extent, features / 2]
    return torch.stack([phase.sin(), phase.cos()], dim=-1).flatten(1)


def pyramid_position(level_shapes: Sequence[tuple[int, int]], level_embedding: Tensor) -> Tensor:
    """Sine encoding of every level plus its scale embedding (UN-EPT, Sec. 3.1.2).

    Args:
        level_shapes: L sizes (h_l, w_l).
        level_embedding: [L, d], one vector per level.

    Returns:
        [S, d] in the dtype of `level_embedding`, the levels after each other.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If the number of levels differs, or 4 does not divide d.
    """
    if level_embedding.dim() != 2 or level_embedding.shape[0] != len(level_shapes):
        raise ValueError(
            f"level_embedding: expected [{len(level_shapes)}, d], one vector per level, got "
            f"{tuple(level_embedding.shape)}; pass as many levels as it was built for"
        )
    dtype, device = level_embedding.dtype, level_embedding.device
    parts = [
        sine_position(grid, level_embedding.shape[1], dtype=dtype, device=device) + vector
        for grid, vector in zip(level_shapes, level_embedding.unbind(0), strict=True)
    ]
    return torch.cat(parts)


def cell_centres(
    grid: tuple[int, int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Centres of the cells of a grid, the reference points of its tokens.

    Args:
        grid: (h, w).
        dtype: Of the result.
        device: Of the result.

    Returns:
        [h w, 2] as (x, y) in [0, 1]: ((j + 0.5) / w, (i + 0.5) / h).

    Raises:
        TypeError: If a side is not an integer.
        ValueError: If a side is not positive.
    """
    check_grid(grid, "grid")
    height, width = grid
    y = (torch.arange(height, dtype=dtype, device=device) + 0.5) / height
    x = (torch.arange(width, dtype=dtype, device=device) + 0.5) / width
    centres = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=-1)
    return centres.flatten(0, 1)


class GridEmbedding(nn.Module):
    """Learnt vector per cell of a grid (the query table of UN-EPT's released code), N(0, 1).

    Args:
        grid: (h, w) to learn.
        channels: d.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is not positive.
    """

    def __init__(self, *, grid: tuple[int, int], channels: int) -> None:
        super().__init__()
        check_grid(grid, "grid")
        check_positive(channels, "channels")
        self.grid = (grid[0], grid[1])
        self.weight = nn.Parameter(torch.randn(grid[0] * grid[1], channels))

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """The table for a grid, resized bilinearly where it is another one.

        Args:
            grid: (h', w').

        Returns:
            [1, h' w', d].

        Raises:
            TypeError: If a side is not an integer.
            ValueError: If a side is not positive.
        """
        return resize_position_embedding(
            self.weight[None], old_grid=self.grid, new_grid=grid, num_prefix=0
        )

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"grid={self.grid}, channels={self.weight.shape[1]}"
