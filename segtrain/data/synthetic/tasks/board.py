"""What the tasks draw on: a ground, shapes in one colour with grain, a camera without blur.

Lengths are in units of side / 64 pixels. Positions are (y, x).
"""

from dataclasses import dataclass, field

import numpy as np

from segtrain.data.synthetic import textures
from segtrain.data.synthetic.color import Array, Lch, lch_to_rgb, mix, plane
from segtrain.data.synthetic.layout import clip_window
from segtrain.data.synthetic.shapes import Patch, draw_patch

UNITS = 64
MAX_TRIES = 200
Position = tuple[float, float]
Circle = tuple[Position, float]
_STREAMS = ("answer", "layout", "ground", "surface", "key", "camera")


@dataclass(kw_only=True)
class Streams:
    """Random streams of one image, independent of each other.

    Args:
        answer: draws the answer.
        layout: draws where things are, and how large.
        ground: draws the ground.
        surface: draws what is ambiguous.
        key: draws the grain of what decides; never the answer.
        camera: draws the noise.
    """

    answer: np.random.Generator
    layout: np.random.Generator
    ground: np.random.Generator
    surface: np.random.Generator
    key: np.random.Generator
    camera: np.random.Generator


def streams(entropy: list[int]) -> Streams:
    """Make the streams of one image from the numbers that name it."""
    spawned = np.random.SeedSequence(entropy).spawn(len(_STREAMS))
    made = (np.random.default_rng(child) for child in spawned)
    return Streams(**dict(zip(_STREAMS, made, strict=True)))


@dataclass
class Board:
    """A square picture and its labels.

    Args:
        side: pixels.
    """

    side: int
    image: Array = field(init=False)  # [3, side, side] sRGB, 0..1
    labels: np.ndarray = field(init=False)  # [side, side] uint8

    def __post_init__(self) -> None:
        self.image = np.zeros((3, self.side, self.side), dtype=np.float32)
        self.labels = np.zeros((self.side, self.side), dtype=np.uint8)

    @property
    def unit(self) -> float:
        """Pixels per unit."""
        return self.side / UNITS

    def axis(self, cell: float) -> Array:
        """[side] coordinates in cells of so many units."""
        return np.arange(self.side, dtype=np.float32) / np.float32(cell * self.unit)

    def ground(self, rng: np.random.Generator) -> None:
        """Cover everything with a dim mottled ground, class 0."""
        hue = float(rng.uniform(0, 360))
        low = lch_to_rgb((float(rng.uniform(0.36, 0.44)), 0.03, hue))
        high = lch_to_rgb((float(rng.uniform(0.5, 0.58)), 0.03, hue + 40))
        grain = textures.octaves(rng, self.axis(16.0), self.axis(16.0), 3)
        self.image[...] = mix(low, high, textures.ramp((grain - 0.25) * 2.0))

    def stamp(self, patch: Patch, centre: Position, colors: Array, label: int) -> np.ndarray:
        """Put a shape on the board.

        Args:
            patch: the shape.
            centre: where its middle pixel goes, in units.
            colors: [3, side, side], seen through the shape.
            label: its class.

        Returns:
            [side, side] bool, its pixels.
        """
        half = patch.distance.shape[0] // 2
        top, left = (round(c * self.unit) - half for c in centre)
        frame, part = clip_window(
            top=top,
            left=left,
            side=patch.distance.shape[0],
            height=self.side,
            width=self.side,
        )
        alpha = np.clip(0.5 - patch.distance[part], 0.0, 1.0)
        self.image[:, *frame] += (colors[:, *frame] - self.image[:, *frame]) * alpha
        covered = np.zeros((self.side, self.side), dtype=bool)
        covered[frame] = patch.mask[part]
        self.labels[covered] = label
        return covered

    def paint(self, rng: np.random.Generator, color: Lch) -> Array:
        """[3, side, side] of one colour with grain; what it draws does not depend on the colour."""
        grain = textures.value_noise(rng, self.axis(2.5), self.axis(2.5)) - 0.5
        return plane(lch_to_rgb(color)) * (1.0 + np.float32(0.16) * grain)

    def shape(self, name: str, radius: float, angle: float = 0.0) -> Patch:
        """A thing of the scenes; the radius in units."""
        return draw_patch(
            name=name,
            radius=radius * self.unit,
            aspect=1.0,
            angle=angle,
            hole=0.5,
            shift=(0.0, 0.0),
            margin=0,
        )

    def photograph(self, rng: np.random.Generator) -> np.ndarray:
        """[side, side, 3] uint8 with noise that is independent from pixel to pixel."""
        noise = rng.standard_normal(self.image.shape, dtype=np.float32)
        noise *= np.float32(rng.uniform(1.0, 4.0))
        noise += 255.0 * self.image
        values = np.clip(np.rint(noise), 0.0, 255.0).astype(np.uint8)
        return np.ascontiguousarray(values.transpose(1, 2, 0))


def place(
    rng: np.random.Generator, *, count: int, box: tuple[Position, Position], avoid: list[Circle]
) -> list[Position]:
    """Draw positions in a box, each outside of some circles and of those around its predecessors.

    Args:
        rng: source of randomness.
        count: how many are wanted; those that find no room are left out.
        box: (lowest, highest) position.
        avoid: centres and radii; the last radius is also that around every new position.

    Returns:
        One position or more.

    Raises:
        RuntimeError: if there is no room for one.
    """
    circles = list(avoid)
    spacing = avoid[-1][1]
    found: list[Position] = []
    for _ in range(MAX_TRIES):
        y, x = (float(v) for v in rng.uniform(*box))
        if all((y - c[0]) ** 2 + (x - c[1]) ** 2 >= radius**2 for c, radius in circles):
            found.append((y, x))
            circles.append(((y, x), spacing))
        if len(found) == count:
            break
    if not found:
        raise RuntimeError(f"no room in {box} outside of {avoid}; this is a mistake of the task")
    return found
