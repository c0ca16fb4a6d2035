"""Geometry of tiled windows: which pixels, kernels and outputs belong to a rectangle of tiles.

A tile is r x w neighbouring windows of a content-aware reassembly. Everything here is views and
integers; `banded` computes with them.

Letters: B batch, C channels, H W map, Ho Wo map of windows, k window, s sub-pixels per axis,
T tiles, r w windows per tile, K pixels of the patch a tile reads, N = r w s^2 outputs of a tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

# Windows per tile, chosen by measurement. Taller and wider tiles read less and multiply more zeros.
TILE_HEIGHT = 2
TILE_WIDTHS = range(4, 13)
FAVOURITE_WIDTH = 9


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """A rectangle of equal tiles of windows, for some images of a batch.

    Attributes:
        size: k.
        scale: s.
        stride: Distance of neighbouring windows in the map.
        images: First image and the one after the last.
        top: First row of windows.
        left: First column of windows.
        rows: Number of tiles below each other.
        columns: Number of tiles beside each other.
        height: r.
        width: w.
    """

    size: int
    scale: int
    stride: int
    images: tuple[int, int]
    top: int
    left: int
    rows: int
    columns: int
    height: int
    width: int

    @property
    def count(self) -> int:
        """T, number of tiles."""
        return (self.images[1] - self.images[0]) * self.rows * self.columns

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of the patch a tile reads."""
        return (
            (self.height - 1) * self.stride + self.size,
            (self.width - 1) * self.stride + self.size,
        )

    @property
    def band_shape(self) -> tuple[int, int]:
        """(K, N)."""
        return self.patch[0] * self.patch[1], self.height * self.width * self.scale**2

    def patches_of(self, padded: Tensor) -> Tensor:
        """Overlapping view [images, rows, columns, C, *patch] of a padded map."""
        image, channel, row, column = padded.stride()
        first, last = self.images
        down, right = self.height * self.stride, self.width * self.stride
        return padded.as_strided(
            (last - first, self.rows, self.columns, padded.shape[1], *self.patch),
            (image, down * row, right * column, channel, row, column),
            first * image + self.stride * (self.top * row + self.left * column),
        )

    def outputs_of(self, out: Tensor) -> Tensor:
        """View [images, rows, columns, C, r s, w s] of the output map [B, C, Ho s, Wo s]."""
        height, width = self.height * self.scale, self.width * self.scale
        top, left = self.top * self.scale, self.left * self.scale
        part = out[
            self.images[0] : self.images[1],
            :,
            top : top + self.rows * height,
            left : left + self.columns * width,
        ]
        tiles = part.unflatten(3, (self.columns, width)).unflatten(2, (self.rows, height))
        return tiles.permute(0, 2, 4, 1, 3, 5)

    def kernels_of(self, kernels: Tensor) -> Tensor:
        """View [images, rows, columns, k, k, s, s, r, w] of the kernels [B, k^2, s^2, Ho, Wo]."""
        part = kernels[
            self.images[0] : self.images[1],
            :,
            :,
            self.top : self.top + self.rows * self.height,
            self.left : self.left + self.columns * self.width,
        ]
        tiles = part.unflatten(4, (self.columns, self.width)).unflatten(3, (self.rows, self.height))
        taps = tiles.unflatten(2, (self.scale, self.scale)).unflatten(1, (self.size, self.size))
        return taps.permute(0, 5, 7, 1, 2, 3, 4, 6, 8)

    def taps_of(self, band: Tensor) -> Tensor:
        """The same axes as `kernels_of`, as a view of contiguous bands [T, K, N].

        Tap (dy, dx) of window (py, px) meets pixel (py stride + dy, px stride + dx) of the patch;
        the outputs of a tile are ordered (py, sy, px, sx).
        """
        _, outputs = self.band_shape
        column = outputs  # one pixel to the right in the patch is one row of the band
        row = self.patch[1] * column
        tile = self.patch[0] * row
        lines = self.width * self.scale
        return band.as_strided(
            (
                self.images[1] - self.images[0],
                self.rows,
                self.columns,
                *(self.size, self.size, self.scale, self.scale, self.height, self.width),
            ),
            (
                self.rows * self.columns * tile,
                self.columns * tile,
                tile,
                *(row, column, lines, 1),
                self.stride * row + self.scale * lines,
                self.stride * column + self.scale,
            ),
        )

    def disjoint_parts(self) -> Iterator[tuple[slice, slice]]:
        """Selections of tile rows and columns whose patches do not overlap; together all tiles."""
        row_step = -(-self.patch[0] // (self.height * self.stride))
        column_step = -(-self.patch[1] // (self.width * self.stride))
        for row in range(min(row_step, self.rows)):
            for column in range(min(column_step, self.columns)):
                yield slice(row, None, row_step), slice(column, None, column_step)

    def chunks(self, max_tiles: int) -> Iterator["Tiles"]:
        """Rows of tiles, several images at a time where a whole image fits, the largest first.

        Args:
            max_tiles: Upper limit of T, unless one row has more.

        Yields:
            Parts that cover the rectangle.
        """
        rows = max(1, min(self.rows, max_tiles // self.columns))
        images = max(1, max_tiles // (self.rows * self.columns)) if rows == self.rows else 1
        for first in range(*self.images, images):
            last = min(first + images, self.images[1])
            for row in range(0, self.rows, rows):
                yield replace(
                    self,
                    images=(first, last),
                    top=self.top + row * self.height,
                    rows=min(rows, self.rows - row),
                )


def kernel_sides(kernels: Tensor) -> tuple[int, int]:
    """(k, s) of kernels [B, k^2, s^2, Ho, Wo]; rounded down where they are no squares.

    Args:
        kernels: Kernels of any size.

    Returns:
        Side of the window, side of the block of sub-pixels.
    """
    return _root(kernels.shape[1]), _root(kernels.shape[2])


def _root(square: int) -> int:
    """Square root, rounded down. By comparisons: a compiler with symbolic sizes follows them."""
    root = 0
    while (root + 1) ** 2 <= square:
        root += 1
    return root


def tilings(x: Tensor, kernels: Tensor, stride: int) -> Iterator[Tiles]:
    """Cut the map of windows into at most four rectangles of equal tiles.

    Args:
        x: Map [B, C, H, W].
        kernels: Kernels [B, k^2, s^2, Ho, Wo].
        stride: Distance of neighbouring windows.

    Yields:
        Rectangles that cover every window exactly once.
    """
    size, scale = kernel_sides(kernels)
    height, width = kernels.shape[-2:]
    tile_width = _tile_width(width)
    for top, tile_rows, tile_height in _cut(height, min(TILE_HEIGHT, height)):
        for left, tile_columns, used_width in _cut(width, tile_width):
            yield Tiles(
                size=size,
                scale=scale,
                stride=stride,
                images=(0, x.shape[0]),
                top=top,
                left=left,
                rows=tile_rows,
                columns=tile_columns,
                height=tile_height,
                width=used_width,
            )


def _tile_width(extent: int) -> int:
    """Width that leaves the narrowest rest."""
    if extent <= TILE_WIDTHS[-1]:
        return extent
    return min(TILE_WIDTHS, key=lambda width: (extent % width, abs(width - FAVOURITE_WIDTH)))


def _cut(extent: int, step: int) -> list[tuple[int, int, int]]:
    """(start, number, size) of the tiles along one axis: whole ones, then the rest as one."""
    number, rest = divmod(extent, step)
    parts = [(0, number, step)]
    return [*parts, (number * step, 1, rest)] if rest else parts
