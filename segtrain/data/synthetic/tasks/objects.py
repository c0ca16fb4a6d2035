"""Tasks of objects on a ground: discs whose class something else decides, near or far.

Every disc looks the same whatever its class, except in `local`.
"""

import numpy as np

from segtrain.data.synthetic.color import Lch
from segtrain.data.synthetic.tasks.board import UNITS, Board, Circle, Position, Streams, place

FAR_REACH, SCENE_REACH = 24.0, 16.0
PLAIN: Lch = (0.84, 0.02, 90.0)
WARM_COLD: tuple[Lch, Lch] = ((0.68, 0.17, 40.0), (0.68, 0.17, 250.0))
GREEN_PINK: tuple[Lch, Lch] = ((0.72, 0.17, 145.0), (0.72, 0.17, 340.0))
_DISC, _KEY, _SIGN = 5.0, 6.0, 4.0  # radii in units
FIRST_ANSWER = 2  # its class: 0 is the ground, 1 what decides


def draw_far(board: Board, random: Streams, answer: int) -> np.ndarray:
    """A ring in one corner; its colour is the class of all discs.

    Args:
        board: drawn in place.
        random: streams of the image.
        answer: 0 or 1.

    Returns:
        [side, side] bool: the discs.
    """
    corner = _draw_key(board, random, answer)
    return _draw_discs(board, random, [corner], PLAIN, answer)


def draw_local(board: Board, random: Streams, answer: int) -> np.ndarray:
    """The same picture, but the discs wear the colour themselves; that of the ring says nothing.

    Args:
        board: drawn in place.
        random: streams of the image.
        answer: 0 or 1.

    Returns:
        [side, side] bool: the discs.
    """
    corner = _draw_key(board, random, int(random.key.integers(2)))
    return _draw_discs(board, random, [corner], WARM_COLD[answer], answer)


def draw_scene(board: Board, random: Streams, answer: int) -> np.ndarray:
    """Squares and stars along one edge, each kind in one of two colours; discs far from them.

    The class is whether the two colours go together: warm squares with green stars, or cold ones
    with pink ones. Neither kind tells it alone.

    Args:
        board: drawn in place.
        random: streams of the image.
        answer: 0 or 1.

    Returns:
        [side, side] bool: the discs.
    """
    squares = int(random.key.integers(2))
    kinds = {"square": WARM_COLD[squares], "star": GREEN_PINK[squares ^ answer]}
    turn = int(random.layout.integers(4))
    box = ((5.0, 5.0), (18.0, UNITS - 5.0))
    spots = place(random.layout, count=4, box=box, avoid=[((-99.0, -99.0), 2.2 * _SIGN)])
    spots = [_turned(spot, turn) for spot in spots]
    names = [name for name in kinds for _ in range(2)]
    # A kind is never left out: the first two spots, which always find room, hold one of each.
    order = [0, 2, 1, 3]
    for spot, which in zip(spots, order, strict=False):
        name = names[which]
        angle = float(random.layout.uniform(0, 2 * np.pi))
        colors = board.paint(random.key, kinds[name])
        board.stamp(board.shape(name, _SIGN, angle), spot, colors, 1)
    clear = SCENE_REACH + _SIGN + _DISC + 2.0
    return _draw_discs(board, random, [(spot, clear) for spot in spots], PLAIN, answer)


def _draw_key(board: Board, random: Streams, color: int) -> Circle:
    """Draw the ring; returns the circle that the discs must not enter."""
    y, x = (float(v) for v in random.layout.uniform(_KEY + 1.0, _KEY + 6.0, 2))
    centre = _turned((y, x), int(random.layout.integers(4)))
    board.stamp(board.shape("ring", _KEY), centre, board.paint(random.key, WARM_COLD[color]), 1)
    return centre, FAR_REACH + _KEY + _DISC + 2.0


def _draw_discs(
    board: Board, random: Streams, avoid: list[Circle], color: Lch, answer: int
) -> np.ndarray:
    box = ((_DISC + 1.0,) * 2, (UNITS - _DISC - 1.0,) * 2)
    count = int(random.layout.integers(2, 4))
    nowhere: Circle = ((-99.0, -99.0), 2.0 * _DISC + 2.0)
    covered = np.zeros(board.labels.shape, dtype=bool)
    for spot in place(random.layout, count=count, box=box, avoid=[*avoid, nowhere]):
        radius = float(random.layout.uniform(0.8, 1.0)) * _DISC
        colors = board.paint(random.surface, color)
        covered |= board.stamp(board.shape("disc", radius), spot, colors, FIRST_ANSWER + answer)
    return covered


def _turned(spot: Position, quarters: int) -> Position:
    y, x = spot
    for _ in range(quarters):
        y, x = x, UNITS - y
    return y, x
