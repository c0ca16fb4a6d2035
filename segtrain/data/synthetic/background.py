"""The stuff of a scene: a landscape or a room, with clutter lying on it."""

import numpy as np

from segtrain.data.synthetic.canvas import Canvas, blank_canvas
from segtrain.data.synthetic.clutter import draw_clutter
from segtrain.data.synthetic.landscape import draw_landscape
from segtrain.data.synthetic.room import draw_room

_LANDSCAPE_SHARE = 0.62


def draw_background(rng: np.random.Generator, *, height: int, width: int) -> Canvas:
    """Draw the stuff of one scene.

    Args:
        rng: source of randomness.
        height: H, pixels.
        width: W, pixels.

    Returns:
        The canvas; every pixel is labelled.
    """
    canvas = blank_canvas(height=height, width=width)
    draw = draw_landscape if rng.random() < _LANDSCAPE_SHARE else draw_room
    draw(rng, canvas)
    draw_clutter(rng, canvas)
    return canvas
