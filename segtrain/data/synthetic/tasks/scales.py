"""Tasks of two scales: the whole decides the part, or the detail decides the whole."""

import numpy as np

from segtrain.data.synthetic import textures
from segtrain.data.synthetic.color import Lch
from segtrain.data.synthetic.tasks.board import UNITS, Board, Position, Streams, place
from segtrain.data.synthetic.tasks.objects import FIRST_ANSWER, PLAIN

WHOLE_REACH, DETAIL_REACH = 9.0, 6.0
AMPLITUDE = 24  # of the lines, in steps of 1 / 255
_FIGURE: Lch = (0.66, 0.09, 0.0)
_DOT, _CORE = 3.0, 8.0  # radii in units
_SWELL = 0.25  # of the waves, from crest to trough


def draw_whole(board: Board, random: Streams, answer: int) -> np.ndarray:
    """Dots on a plain disc amid broad waves; their class is the direction of the waves.

    A wave is three coarse cells long, and its mean over a period is zero.

    Args:
        board: drawn in place.
        random: streams of the image.
        answer: 0 or 1.

    Returns:
        [side, side] bool: the dots.
    """
    period, phase = random.key.uniform(22.0, 26.0), random.key.uniform()
    waves = textures.wave(board.axis(period) + np.float32(phase), 0.5) - 0.5
    board.image += np.float32(_SWELL) * (waves[:, None] if answer == 0 else waves)
    middle = 0.5 * UNITS
    y, x = (float(v) for v in random.layout.uniform(middle - 4.0, middle + 4.0, 2))
    radius = float(random.layout.uniform(19.0, 21.0))
    hue = float(random.surface.uniform(0, 360))
    colors = board.paint(random.surface, (*_FIGURE[:2], hue))
    board.stamp(board.shape("disc", radius), (y, x), colors, 1)
    room = (radius - WHOLE_REACH - _DOT - 1.0) / 2**0.5
    box = ((y - room, x - room), (y + room, x + room))
    spots = place(random.layout, count=2, box=box, avoid=[((-99.0, -99.0), 2.0 * _DOT + 1.0)])
    covered = np.zeros(board.labels.shape, dtype=bool)
    for spot in spots:
        colors = board.paint(random.surface, PLAIN)
        covered |= board.stamp(board.shape("disc", _DOT), spot, colors, FIRST_ANSWER + answer)
    return covered


def draw_detail(board: Board, random: Streams, answer: int) -> np.ndarray:
    """A large disc with a core of fine lines, see `engrave`; their direction is its class.

    Args:
        board: drawn in place; the lines come later, on the photograph.
        random: streams of the image.
        answer: 0 or 1.

    Returns:
        [side, side] bool: the disc, but for the core and what is near it.
    """
    middle = 0.5 * UNITS
    y, x = (float(v) for v in random.layout.uniform(middle - 4.0, middle + 4.0, 2))
    spot = y, x
    radius = float(random.layout.uniform(22.0, 26.0))
    hue = float(random.surface.uniform(0, 360))
    colors = board.paint(random.surface, (*_FIGURE[:2], hue))
    disc = board.stamp(board.shape("disc", radius), spot, colors, FIRST_ANSWER + answer)
    # Whole 2 x 2 cells, so that every mean over even cells is blind to the lines.
    cells = np.indices(disc.shape) // 2 * 2 + 1
    core = _away(cells, board, spot) <= _CORE - 1.0
    board.labels[core] = 1
    return disc & (_away(np.indices(disc.shape), board, spot) > _CORE + DETAIL_REACH + 1.0)


def _away(grid: np.ndarray, board: Board, spot: Position) -> np.ndarray:
    """[H, W] distance of pixels [2, H, W] from a position, in units."""
    return np.hypot(grid[0] / board.unit - spot[0], grid[1] / board.unit - spot[1])


def engrave(image: np.ndarray, core: np.ndarray, answer: int) -> np.ndarray:
    """Add lines of one pixel, rows or columns, whose mean over each 2 x 2 cell is zero.

    Args:
        image: [H, W, 3] uint8.
        core: [H, W] bool, whole 2 x 2 cells.
        answer: 0 for rows, 1 for columns.

    Returns:
        [H, W, 3] uint8; clipped before the lines are added, so that no sum over a cell changes.
    """
    lines = 1 - 2 * (np.indices(core.shape)[answer] % 2)
    flat = np.clip(image.astype(np.int16), AMPLITUDE, 255 - AMPLITUDE)
    return (flat + (AMPLITUDE * lines * core)[..., None]).astype(np.uint8)
