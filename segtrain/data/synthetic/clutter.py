"""Unlabelled distractors: thin strokes, arcs and pebbles that belong to the stuff they lie on."""

import numpy as np

from segtrain.data.synthetic.canvas import Canvas
from segtrain.data.synthetic.color import Array, plane
from segtrain.data.synthetic.layout import clip_window

_NUM = (8, 22)


def draw_clutter(rng: np.random.Generator, canvas: Canvas) -> None:
    """Draw clutter into the background; labels stay as they are.

    Each piece stays inside the stuff class at its middle, so the label map remains exact.

    Args:
        rng: source of randomness.
        canvas: its image is changed in place.
    """
    labels = canvas.labels
    height, width = labels.shape
    for _ in range(int(rng.integers(_NUM[0], _NUM[1] + 1))):
        y, x = int(rng.integers(height)), int(rng.integers(width))
        distance = _piece(rng, canvas.unit)
        half = distance.shape[0] // 2
        frame, part = clip_window(
            top=y - half, left=x - half, side=2 * half + 1, height=height, width=width
        )
        alpha = np.clip(0.5 - distance[part], 0.0, 1.0) * np.float32(rng.uniform(0.35, 0.8))
        alpha = alpha * (labels[frame] == labels[y, x])
        tint = canvas.image[:, y, x] * 0.75 + 0.25 * rng.random(3, dtype=np.float32)
        tint = np.clip(tint + np.float32(rng.choice([-0.2, 0.2])), 0.0, 1.0)
        canvas.image[:, *frame] += (plane(tint) - canvas.image[:, *frame]) * alpha


def _piece(rng: np.random.Generator, unit: float) -> Array:
    """[P, P] signed distance in pixels of one piece, P odd."""
    kind = int(rng.integers(3))
    reach = (
        float(rng.uniform(6.0, 24.0)) * unit if kind < 2 else float(rng.uniform(1.2, 3.2)) * unit
    )
    half = int(np.ceil(1.4 * reach)) + 2
    axis = np.arange(-half, half + 1, dtype=np.float32)
    angle = float(rng.uniform(0.0, 2.0 * np.pi))
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u = axis[None, :] * cos + axis[:, None] * sin
    v = axis[:, None] * cos - axis[None, :] * sin
    thickness = max(float(rng.uniform(0.4, 1.1)) * unit, 0.4)
    if kind == 0:
        return np.hypot(u - np.clip(u, -reach, reach), v) - np.float32(thickness)
    if kind == 1:
        return _arc(u, v, reach, float(rng.uniform(0.3, 0.9)), thickness)
    wobble = 1.0 + 0.3 * np.sin(3.0 * np.arctan2(v, u) + np.float32(angle))
    return np.hypot(u, 1.4 * v) - np.float32(reach) * wobble


def _arc(u: Array, v: Array, radius: float, opening: float, thickness: float) -> Array:
    """Part of a circle around the u axis, `opening` radians to each side."""
    on_ring = np.abs(np.hypot(u, v) - np.float32(radius))
    end_u, end_v = radius * np.cos(opening), radius * np.sin(opening)
    to_end = np.hypot(u - np.float32(end_u), np.abs(v) - np.float32(end_v))
    inside = np.abs(np.arctan2(v, u)) <= opening
    return np.where(inside, on_ring, to_end) - np.float32(thickness)
