"""Procedural textures as scalar fields in 0..1.

H W is the map. Fields are sampled at coordinates given in *cells*: one cell is one period of a
pattern or one lattice step of the noise, so the caller decides scale, rotation and perspective.
"""

import numpy as np

from segtrain.data.synthetic.color import Array


def ramp(value: Array) -> Array:
    """Smooth 0..1 step, 3t^2 - 2t^3, of values clipped to 0..1."""
    t = np.clip(value, 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def value_noise(rng: np.random.Generator, ys: Array, xs: Array) -> Array:
    """Interpolate a random lattice on a separable grid.

    Args:
        rng: source of the lattice and of its phase.
        ys: [H] row coordinates in cells.
        xs: [W] column coordinates in cells.

    Returns:
        [H, W] float32 in 0..1.
    """
    low_y, low_x = float(ys.min()), float(xs.min())
    phase = rng.random(2, dtype=np.float32)
    y = ys - low_y + phase[0]
    x = xs - low_x + phase[1]
    row, column = y.astype(np.int64), x.astype(np.int64)
    lattice = rng.random((int(row.max()) + 2, int(column.max()) + 2), dtype=np.float32)
    weight_y = ramp(y - np.floor(y))[:, None]
    weight_x = ramp(x - np.floor(x))
    rows = lattice[row] + (lattice[row + 1] - lattice[row]) * weight_y
    left, right = np.take(rows, column, axis=1), np.take(rows, column + 1, axis=1)
    right -= left
    right *= weight_x
    return left + right


def octaves(rng: np.random.Generator, ys: Array, xs: Array, num: int = 4) -> Array:
    """Sum value noise over `num` octaves, each twice as fine and half as strong.

    Args:
        rng: source of randomness.
        ys: [H] row coordinates in cells of the coarsest octave.
        xs: [W] column coordinates in cells of the coarsest octave.
        num: number of octaves.

    Returns:
        [H, W] float32 in 0..1, mean about 0.5.
    """
    total = value_noise(rng, ys, xs)
    for k in range(1, num):
        total += value_noise(rng, ys * 2.0**k, xs * 2.0**k) * np.float32(0.5**k)
    return total / np.float32(2.0 - 0.5 ** (num - 1))


def wave(t: Array, softness: float = 0.25) -> Array:
    """Square wave of period 1 with soft edges.

    Args:
        t: coordinates in cells, any shape.
        softness: share of the period spent in transition, > 0.

    Returns:
        Same shape, 0..1.
    """
    return np.clip(0.5 + np.sin(2.0 * np.pi * t) / np.float32(np.pi * softness), 0.0, 1.0)


def dots(y: Array, x: Array, radius: float = 0.3, softness: float = 0.12) -> Array:
    """Dots on a square lattice, one in the middle of each cell.

    Args:
        y: row coordinates in cells, any shape.
        x: column coordinates in cells, same shape.
        radius: dot radius in cells.
        softness: width of the edge in cells.

    Returns:
        Same shape, 1 inside the dots.
    """
    distance = np.hypot(y - np.floor(y) - 0.5, x - np.floor(x) - 0.5)
    return np.clip(0.5 - (distance - np.float32(radius)) / np.float32(softness), 0.0, 1.0)


def checks(y: Array, x: Array, softness: float = 0.25) -> Array:
    """Chequer board with fields of half a cell and soft edges.

    Args:
        y: row coordinates in cells, any shape.
        x: column coordinates in cells, broadcastable to y.
        softness: share of the period spent in transition, > 0.

    Returns:
        Broadcast shape, 0..1.
    """
    a, b = wave(y, softness), wave(x, softness)
    return a + b - 2.0 * a * b


def joints(y: Array, x: Array, *, width_y: Array | float, width_x: Array | float) -> Array:
    """Running-bond pattern: the lines between bricks or planks.

    Args:
        y: [H, W] coordinates in courses.
        x: [H, W] coordinates in bricks.
        width_y: half width of the lines between courses, in cells.
        width_x: half width of the lines between bricks, in cells.

    Returns:
        [H, W], 1 on the lines, 0 in the bricks.
    """
    course = np.floor(y)
    shifted = x + 0.5 * (course % 2.0)
    to_course = 0.5 - np.abs(y - course - 0.5)
    to_brick = 0.5 - np.abs(shifted - np.floor(shifted) - 0.5)
    return np.maximum(
        np.clip(1.5 - to_course / width_y, 0.0, 1.0), np.clip(1.5 - to_brick / width_x, 0.0, 1.0)
    )


def cell_values(rng: np.random.Generator, y: Array, x: Array) -> Array:
    """One random value per cell of a running-bond pattern.

    Args:
        rng: source of the table of values.
        y: [H, W] coordinates in courses.
        x: [H, W] coordinates in bricks.

    Returns:
        [H, W] in 0..1, constant within each brick.
    """
    table = rng.random(251, dtype=np.float32)
    course = np.floor(y).astype(np.int64)
    brick = np.floor(x + 0.5 * (course % 2)).astype(np.int64)
    return table[(course * 37 + brick * 11) % 251]
