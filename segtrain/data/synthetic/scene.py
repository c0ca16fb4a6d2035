"""One synthetic scene: an image with exact semantic and instance ground truth."""

from dataclasses import dataclass

import numpy as np

from segtrain.data.synthetic.background import draw_background
from segtrain.data.synthetic.categories import CATEGORY_ID
from segtrain.data.synthetic.layout import Placement, place_things
from segtrain.data.synthetic.paint import light_scene, paint_thing, shadow_margin

MIN_SIDE, MAX_SIDE = 32, 4096


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One visible thing.

    Args:
        instance_id: its value in `Scene.instance`, 1..; higher is nearer to the viewer.
        category_id: its class.
        area: visible pixels.
        bbox: x, y, width, height of the visible pixels.
        full_area: pixels of the whole shape, hidden ones and those outside the frame included.
    """

    instance_id: int
    category_id: int
    area: int
    bbox: tuple[int, int, int, int]
    full_area: int


@dataclass(frozen=True, kw_only=True)
class Scene:
    """An image and its truth; every pixel has a class.

    Args:
        image: [H, W, 3] uint8, RGB.
        semantic: [H, W] uint8, category ids, things included.
        instance: [H, W] uint8, 0 on stuff, otherwise `SceneObject.instance_id`.
        objects: the things, back to front.
    """

    image: np.ndarray
    semantic: np.ndarray
    instance: np.ndarray
    objects: tuple[SceneObject, ...]


def generate_scene(*, seed: int, index: int, size: tuple[int, int] = (256, 256)) -> Scene:
    """Draw scene number `index` of a seed; it depends on nothing else.

    Args:
        seed: seed of the data set, >= 0.
        index: number of the scene, >= 0.
        size: width and height in pixels, each 32..4096.

    Returns:
        The scene.

    Raises:
        ValueError: for a negative seed or index, or a size out of range.
    """
    check_size(size)
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must be >= 0, got seed {seed}, index {index}; use 0")
    width, height = size
    streams = np.random.SeedSequence([seed, index, width, height]).spawn(4)
    layout, stuff, surface, camera = (np.random.default_rng(s) for s in streams)
    placed, instance = place_things(
        layout, height=height, width=width, margin=shadow_margin(height, width)
    )
    canvas = draw_background(stuff, height=height, width=width)
    turn = float(camera.uniform(-2.6, -0.55))  # the lamp is above the scene
    light = (float(np.cos(turn)), float(np.sin(turn)))
    for placement in placed:
        paint_thing(surface, canvas.image, placement, light)
    objects = tuple(_describe(p, k, instance) for k, p in enumerate(placed, start=1))
    semantic = canvas.labels
    for thing in objects:
        semantic[instance == thing.instance_id] = thing.category_id
    image = light_scene(camera, canvas.image, light)
    return Scene(image=image, semantic=semantic, instance=instance, objects=objects)


def check_size(size: tuple[int, int]) -> None:
    """Refuse a size (width, height) that the generator cannot draw.

    Args:
        size: width and height in pixels.

    Raises:
        ValueError: when a side is out of range.
    """
    if not all(MIN_SIDE <= side <= MAX_SIDE for side in size):
        raise ValueError(
            f"size must be {MIN_SIDE}..{MAX_SIDE} pixels per side, got {size[0]}x{size[1]}; "
            "use for example 256x256"
        )


def _describe(placement: Placement, instance_id: int, instance: np.ndarray) -> SceneObject:
    mask = instance == instance_id
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return SceneObject(
        instance_id=instance_id,
        category_id=CATEGORY_ID[placement.name],
        area=int(np.count_nonzero(mask)),
        bbox=(x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1),
        full_area=placement.full_area,
    )
