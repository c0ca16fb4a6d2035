"""Where the things of a scene go, decided on exact pixel masks before anything is painted.

Rule of visibility: every placed thing shows at least `MIN_VISIBLE_AREA` pixels and at least
`MIN_VISIBLE_SHARE` of its full area (the part outside the frame counts as hidden). A placement that
would break the rule for itself or for a thing behind it is drawn again; after `NUM_TRIES` tries the
thing is left out of the scene, so the image never shows what the truth does not list.
"""

from dataclasses import dataclass

import numpy as np

from segtrain.data.synthetic.categories import THINGS
from segtrain.data.synthetic.shapes import Patch, draw_patch

MIN_VISIBLE_AREA = 40
MIN_VISIBLE_SHARE = 0.25
NUM_TRIES = 24
NUM_THINGS = (3, 8)
EXTENT = (16.0, 120.0)  # largest extent in units of min(H, W) / 256 pixels
MIN_EXTENT = 14.0  # pixels; the thinnest shape, a flat star, then still has MIN_VISIBLE_AREA


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One thing in the frame.

    Args:
        name: thing class.
        patch: the rasterised shape.
        top: frame row of the patch's first row, may be negative.
        left: frame column of the patch's first column, may be negative.
        full_area: pixels of the whole shape, the part outside the frame included.
    """

    name: str
    patch: Patch
    top: int
    left: int
    full_area: int


def clip_window(
    *, top: int, left: int, side: int, height: int, width: int
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Cut a square patch to the frame.

    Args:
        top: frame row of the patch's first row.
        left: frame column of the patch's first column.
        side: P, side of the patch.
        height: H of the frame.
        width: W of the frame.

    Returns:
        Row and column slices of the frame, and of the patch; empty when they do not meet.
    """
    y0, y1 = max(top, 0), max(min(top + side, height), 0)
    x0, x1 = max(left, 0), max(min(left + side, width), 0)
    frame = (slice(y0, max(y0, y1)), slice(x0, max(x0, x1)))
    first_y, first_x = y0 - top, x0 - left
    return frame, (
        slice(first_y, first_y + frame[0].stop - y0),
        slice(first_x, first_x + frame[1].stop - x0),
    )


def place_things(
    rng: np.random.Generator, *, height: int, width: int, margin: int
) -> tuple[list[Placement], np.ndarray]:
    """Choose and place the things of one scene, back to front.

    Args:
        rng: source of randomness.
        height: H, pixels.
        width: W, pixels.
        margin: pixels that each patch extends beyond its shape.

    Returns:
        The placements, and the instance map [H, W] uint8: 0 where no thing is visible, otherwise
        1 + the position in the list.
    """
    instances = np.zeros((height, width), dtype=np.uint8)
    placed: list[Placement] = []
    for patch_name, patch in _draw_shapes(rng, min(height, width), margin):
        placement, updated = _try_to_place(rng, patch_name, patch, placed, instances)
        if placement is not None:
            placed.append(placement)
            instances = updated
    return placed, instances


def _draw_shapes(rng: np.random.Generator, side: int, margin: int) -> list[tuple[str, Patch]]:
    """Shapes with random class, size and pose; large ones tend to come first, that is behind."""
    shapes = []
    num = int(rng.integers(NUM_THINGS[0], NUM_THINGS[1] + 1))
    low, high = np.log(EXTENT[0]), np.log(EXTENT[1])
    sizes = rng.uniform(low, high, num)
    order = np.argsort(-sizes + rng.normal(0.0, 0.5, num))
    for size in sizes[order]:
        extent = max(float(np.exp(size)) * side / 256.0, MIN_EXTENT)
        name = THINGS[int(rng.integers(len(THINGS)))].name
        patch = draw_patch(
            name=name,
            radius=0.5 * extent,
            aspect=float(rng.uniform(0.72, 1.0)),
            angle=float(rng.uniform(0.0, 2.0 * np.pi)),
            hole=float(rng.uniform(0.45, 0.62)),
            shift=(float(rng.uniform(-0.5, 0.5)), float(rng.uniform(-0.5, 0.5))),
            margin=margin,
        )
        shapes.append((name, patch))
    return shapes


def _try_to_place(
    rng: np.random.Generator,
    name: str,
    patch: Patch,
    placed: list[Placement],
    instances: np.ndarray,
) -> tuple[Placement | None, np.ndarray]:
    mask = patch.mask
    full_area = int(np.count_nonzero(mask))
    areas = np.array([p.full_area for p in placed] + [full_area])
    for _ in range(NUM_TRIES):
        top, left = _draw_corner(rng, patch, placed, instances.shape)
        candidate = _overlay(instances, mask, top, left, len(placed) + 1)
        visible = np.bincount(candidate.ravel(), minlength=len(areas) + 1)[1:]
        if np.all(visible >= np.maximum(MIN_VISIBLE_AREA, MIN_VISIBLE_SHARE * areas)):
            placement = Placement(name=name, patch=patch, top=top, left=left, full_area=full_area)
            return placement, candidate
    return None, instances


def _draw_corner(
    rng: np.random.Generator, patch: Patch, placed: list[Placement], shape: tuple[int, ...]
) -> tuple[int, int]:
    """Top left corner of a patch: near another thing one time in three, else anywhere."""
    half = patch.distance.shape[0] // 2
    centre = rng.uniform(0.0, 1.0, 2) * np.array(shape)
    if placed and rng.random() < 0.35:
        other = placed[int(rng.integers(len(placed)))]
        middle = np.array([other.top, other.left]) + other.patch.distance.shape[0] // 2
        reach = 0.9 * (other.patch.radius + patch.radius)
        turn = rng.uniform(0.0, 2.0 * np.pi)
        centre = middle + reach * np.array([np.sin(turn), np.cos(turn)])
    inset = min(0.55 * patch.radius, 0.5 * min(shape))
    centre = np.clip(centre, inset, np.array(shape) - inset)
    top, left = np.round(centre).astype(int) - half
    return int(top), int(left)


def _overlay(
    instances: np.ndarray, mask: np.ndarray, top: int, left: int, number: int
) -> np.ndarray:
    height, width = instances.shape
    frame, part = clip_window(top=top, left=left, side=mask.shape[0], height=height, width=width)
    result = instances.copy()
    result[frame][mask[part]] = number
    return result
