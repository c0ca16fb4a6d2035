"""The picture that the stuff is drawn on: colours and labels that can never disagree."""

from dataclasses import dataclass

import numpy as np

from segtrain.data.synthetic.categories import CATEGORY_ID
from segtrain.data.synthetic.color import Array


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """A frame or its lower rows.

    Args:
        image: [3, H, W] sRGB floats about 0..1; planar, because numpy is fastest that way.
        labels: [H, W] uint8 category ids.
        ys: [H] row coordinates in units of min(H, W) / 256 pixels, so that a scene keeps its look
            at every size.
        xs: [W] column coordinates in units.
        unit: pixels per unit.
    """

    image: Array
    labels: np.ndarray
    ys: Array
    xs: Array
    unit: float

    @property
    def bottom(self) -> float:
        """Coordinate of the last row."""
        return float(self.ys[-1])

    def level(self, y: float) -> Array:
        """[W] horizontal line at height y."""
        return np.full(len(self.xs), y, dtype=np.float32)

    def below(self, y: float) -> "Canvas":
        """View of the rows from just above y to the bottom; drawing on it draws on this one."""
        first = min(max(int(y * self.unit) - 1, 0), len(self.ys) - 1)
        return Canvas(
            image=self.image[:, first:],
            labels=self.labels[first:],
            ys=self.ys[first:],
            xs=self.xs,
            unit=self.unit,
        )

    def cover(self, name: str, edge: Array, colors: Array) -> None:
        """Cover everything below a line: soft edge for the image, hard for the labels.

        Args:
            name: stuff class.
            edge: [W] row coordinate of the line in units.
            colors: [3, H, W] or [3, 1, 1] colours.
        """
        depth = (self.ys[:, None] - edge) * np.float32(self.unit)
        change = colors - self.image
        change *= np.clip(depth + 0.5, 0.0, 1.0)
        self.image[...] += change
        self.labels[depth >= 0.0] = CATEGORY_ID[name]


def blank_canvas(*, height: int, width: int) -> Canvas:
    """Make a black, unlabelled canvas.

    Args:
        height: H, pixels.
        width: W, pixels.

    Returns:
        The canvas, with coordinates from 0.
    """
    unit = min(height, width) / 256.0
    return Canvas(
        image=np.zeros((3, height, width), dtype=np.float32),
        labels=np.zeros((height, width), dtype=np.uint8),
        ys=np.arange(height, dtype=np.float32) / np.float32(unit),
        xs=np.arange(width, dtype=np.float32) / np.float32(unit),
        unit=unit,
    )
