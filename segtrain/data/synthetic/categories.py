"""The classes of the synthetic scenes: things first, then stuff, ids 1..K without gaps."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Category:
    """One class.

    Args:
        id: category id, 1..K; 0 is never used, so it can mean void.
        name: class name.
        isthing: True for countable objects, False for stuff.
        color: sRGB triple 0..255 for drawing label maps; plays no part in the images.
    """

    id: int
    name: str
    isthing: bool
    color: tuple[int, int, int]


_THING_COLORS = {
    "disc": (230, 57, 70),
    "ring": (244, 162, 97),
    "triangle": (233, 196, 106),
    "square": (131, 56, 236),
    "star": (255, 0, 110),
    "cross": (29, 53, 87),
}
_STUFF_COLORS = {
    "sky": (142, 202, 230),
    "hills": (82, 121, 111),
    "water": (33, 158, 188),
    "meadow": (144, 190, 109),
    "wall": (221, 184, 146),
    "floor": (127, 79, 36),
}

CATEGORIES = tuple(
    Category(id=i, name=name, isthing=name in _THING_COLORS, color=color)
    for i, (name, color) in enumerate((_THING_COLORS | _STUFF_COLORS).items(), start=1)
)
THINGS = tuple(c for c in CATEGORIES if c.isthing)
STUFF = tuple(c for c in CATEGORIES if not c.isthing)
CATEGORY_ID = {c.name: c.id for c in CATEGORIES}
