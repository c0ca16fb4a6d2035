"""The task of outlines: what they do between two cells of a coarse map decides the score."""

import numpy as np

from segtrain.data.synthetic.color import Array
from segtrain.data.synthetic.shapes import Patch
from segtrain.data.synthetic.tasks.board import UNITS, Board, Streams

BAND = 1  # pixels on either side of an outline
_RADIUS = (15.0, 21.0)
_WAVES = (3, 7)  # around the outline: bays of 13 to 44 pixels at a side of 64
_DEPTH = (0.1, 0.2)  # of the radius: less than half a cell of 8 pixels


def draw_boundary(board: Board, random: Streams, answer: int) -> np.ndarray:
    """One object with a wavy outline, in a colour that every pixel tells.

    Args:
        board: drawn in place.
        random: streams of the image.
        answer: 0 or 1, a second draw of the outline: there is one class of object.

    Returns:
        [side, side] bool: pixels within `BAND` of the other class.
    """
    outline = random.layout.spawn(2)[answer]
    y, x = (float(v) for v in outline.uniform(UNITS / 2 - 5.0, UNITS / 2 + 5.0, 2))
    hue = float(random.surface.uniform(0, 360))
    colors = board.paint(random.surface, (0.76, 0.11, hue))
    covered = board.stamp(_wavy(board, outline), (y, x), colors, 1)
    return near_border(covered)


def near_border(covered: np.ndarray) -> np.ndarray:
    """Pixels whose square of 2 BAND + 1 pixels holds both values; repeated at the frame.

    Args:
        covered: [H, W] bool.

    Returns:
        [H, W] bool.
    """
    size = 2 * BAND + 1
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(covered, BAND, "edge"), (size, size))
    return windows.any((2, 3)) & ~windows.all((2, 3))


def _wavy(board: Board, rng: np.random.Generator) -> Patch:
    """A disc whose radius has two waves along the angle."""
    radius = float(rng.uniform(*_RADIUS)) * board.unit
    half = int(np.ceil(1.4 * radius)) + 2
    axis = np.arange(-half, half + 1, dtype=np.float32)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    angle = np.arctan2(y, x)
    limit: Array = np.full_like(angle, 1.0)
    for depth in (1.0, 0.5):
        waves = int(rng.integers(*_WAVES))
        phase = float(rng.uniform(0, 2 * np.pi))
        limit += np.float32(depth * rng.uniform(*_DEPTH)) * np.cos(waves * angle + phase)
    distance = (np.hypot(y, x) - np.float32(radius) * limit).astype(np.float32)
    return Patch(distance=distance, u=x / radius, v=y / radius, radius=radius)
