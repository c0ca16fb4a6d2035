"""The thing classes as signed distance functions.

A pixel belongs to a shape exactly when the distance at its centre is <= 0; the renderer turns the
same distance into anti-aliased coverage, so image and mask come from one formula.
Distances are in pixels, negative inside; x points right, y down; P is the side of a square patch.
"""

from dataclasses import dataclass

import numpy as np

from segtrain.data.synthetic.color import Array

_ROUNDING = 0.07  # corner radius of the polygons, as a share of the shape's radius


@dataclass(frozen=True, kw_only=True)
class Patch:
    """A shape rasterised on its own square patch, larger than the shape by `margin`.

    Args:
        distance: [P, P] signed distance in pixels.
        u: [P, P] coordinate along the shape's own x axis, in radii.
        v: [P, P] coordinate along the shape's own y axis, in radii.
        radius: half of the largest extent, in pixels.
    """

    distance: Array
    u: Array
    v: Array
    radius: float

    @property
    def mask(self) -> np.ndarray:
        """[P, P] bool, the pixels of the shape."""
        return self.distance <= 0.0


def ellipse_distance(x: Array, y: Array, rx: float, ry: float) -> Array:
    """First-order signed distance to an axis-parallel ellipse, exact for a circle.

    Args:
        x: pixel coordinates from the centre, any shape.
        y: the same for rows.
        rx: half axis along x, pixels.
        ry: half axis along y, pixels.

    Returns:
        Signed distance, same shape; its zero line is exact.
    """
    k0 = np.hypot(x / rx, y / ry)
    k1 = np.hypot(x / rx**2, y / ry**2)
    ratio = np.full_like(k1, min(rx, ry))  # the limit at the centre
    np.divide(k0, k1, out=ratio, where=k1 > 0.0)
    return ratio * (k0 - 1.0)


def polygon_distance(x: Array, y: Array, vertices: np.ndarray) -> Array:
    """Exact signed distance to a simple polygon.

    Args:
        x: pixel coordinates, any shape.
        y: the same for rows.
        vertices: [S, 2] corners (x, y) in order, either direction.

    Returns:
        Signed distance, same shape.
    """
    squared = np.full(x.shape, np.inf, dtype=np.float32)
    inside = np.zeros(x.shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(vertices, np.roll(vertices, -1, axis=0), strict=True):
        ex, ey = np.float32(x1 - x0), np.float32(y1 - y0)
        wx, wy = x - np.float32(x0), y - np.float32(y0)
        t = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0.0, 1.0)
        dx, dy = wx - ex * t, wy - ey * t
        np.minimum(squared, dx * dx + dy * dy, out=squared)
        crosses = (wy >= 0.0) != (y >= np.float32(y1))
        inside ^= crosses & ((ex * wy > ey * wx) == (ey > 0.0))
    return np.where(inside, -np.sqrt(squared), np.sqrt(squared))


def _regular(num: int, radii: tuple[float, ...] = (1.0,)) -> np.ndarray:
    """`num` corners around the origin, first at the top, radii repeating."""
    angle = np.arange(num) * (2.0 * np.pi / num) - 0.5 * np.pi
    radius = np.resize(np.array(radii), num)
    return np.stack([np.cos(angle) * radius, np.sin(angle) * radius], axis=1)


def _cross() -> np.ndarray:
    arm, bar = 0.95, 0.33
    corner = [(bar, arm), (bar, bar), (arm, bar)]
    turn = [(1, 1, False), (1, -1, True), (-1, -1, False), (-1, 1, True)]
    points = []
    for sx, sy, reverse in turn:
        points += [(sx * px, sy * py) for px, py in (reversed(corner) if reverse else corner)]
    return np.array(points)


_POLYGONS = {
    "triangle": _regular(3),
    "square": _regular(4, (1.0,)) @ np.array([[0.5, 0.5], [-0.5, 0.5]]) * 2**0.5,
    "star": _regular(10, (1.0, 0.46)),
    "cross": _cross(),
}


def _distance(name: str, x: Array, y: Array, radius: float, aspect: float, hole: float) -> Array:
    if name in _POLYGONS:
        rounding = _ROUNDING * radius
        corners = _POLYGONS[name] * np.array([1.0, aspect]) * (radius - rounding)
        return polygon_distance(x, y, corners) - np.float32(rounding)
    outer = ellipse_distance(x, y, radius, radius * aspect)
    if name == "disc":
        return outer
    inner = ellipse_distance(x, y, radius * hole, radius * aspect * hole)
    return np.maximum(outer, -inner)


def draw_patch(
    *,
    name: str,
    radius: float,
    aspect: float,
    angle: float,
    hole: float,
    shift: tuple[float, float],
    margin: int,
) -> Patch:
    """Rasterise one shape around the middle of a patch of its own.

    Args:
        name: a thing class.
        radius: half of the largest extent in pixels, > 0.
        aspect: extent along the second axis over the first, 0..1.
        angle: rotation in radians.
        hole: radius of a ring's hole over its radius, 0..1; other shapes ignore it.
        shift: sub-pixel offset (x, y) of the centre from the middle pixel, -0.5..0.5.
        margin: pixels added on each side.

    Returns:
        The patch; P is odd, its middle pixel is the nearest to the centre.

    Raises:
        ValueError: for a name that is no thing class.
    """
    if name not in SHAPE_NAMES:
        raise ValueError(f"unknown shape {name!r}; use one of {', '.join(SHAPE_NAMES)}")
    half = int(np.ceil(radius)) + 1 + margin
    axis = np.arange(-half, half + 1, dtype=np.float32)
    x, y = axis[None, :] - np.float32(shift[0]), axis[:, None] - np.float32(shift[1])
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = x * cos + y * sin, y * cos - x * sin
    distance = _distance(name, u, v, radius, aspect, hole).astype(np.float32)
    return Patch(
        distance=distance, u=u / np.float32(radius), v=v / np.float32(radius), radius=radius
    )


SHAPE_NAMES = ("disc", "ring", *_POLYGONS)
