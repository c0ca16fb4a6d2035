"""The stuff of a scene: a landscape or a room, as an image and a label map.

H W is the map; images are sRGB floats in 0..1. One unit is min(H, W) / 256 pixels, so that a scene
keeps its look at every size.
"""

from dataclasses import dataclass

import numpy as np

from segtrain.data.synthetic import textures
from segtrain.data.synthetic.categories import CATEGORY_ID
from segtrain.data.synthetic.color import Array, Lch, lch_to_rgb, mix


@dataclass(frozen=True, kw_only=True)
class Mood:
    """The colours of one time of day, in OKLCH."""

    zenith: Lch
    horizon: Lch
    cloud: Lch
    far_hill: Lch
    near_hill: Lch
    meadow: Lch
    water: Lch


MOODS = (
    Mood(  # noon
        zenith=(0.62, 0.13, 245),
        horizon=(0.90, 0.05, 225),
        cloud=(0.98, 0.01, 230),
        far_hill=(0.74, 0.06, 235),
        near_hill=(0.50, 0.09, 155),
        meadow=(0.70, 0.14, 128),
        water=(0.60, 0.10, 228),
    ),
    Mood(  # dawn
        zenith=(0.68, 0.09, 295),
        horizon=(0.91, 0.07, 65),
        cloud=(0.92, 0.06, 20),
        far_hill=(0.74, 0.07, 340),
        near_hill=(0.48, 0.08, 300),
        meadow=(0.62, 0.10, 115),
        water=(0.70, 0.07, 325),
    ),
    Mood(  # dusk
        zenith=(0.38, 0.11, 285),
        horizon=(0.80, 0.13, 55),
        cloud=(0.66, 0.14, 20),
        far_hill=(0.54, 0.11, 345),
        near_hill=(0.30, 0.07, 300),
        meadow=(0.42, 0.08, 135),
        water=(0.50, 0.09, 290),
    ),
    Mood(  # overcast
        zenith=(0.72, 0.03, 245),
        horizon=(0.90, 0.02, 220),
        cloud=(0.94, 0.01, 230),
        far_hill=(0.70, 0.03, 205),
        near_hill=(0.46, 0.06, 165),
        meadow=(0.62, 0.10, 122),
        water=(0.58, 0.05, 215),
    ),
    Mood(  # autumn
        zenith=(0.68, 0.10, 235),
        horizon=(0.94, 0.04, 90),
        cloud=(0.98, 0.02, 90),
        far_hill=(0.68, 0.07, 40),
        near_hill=(0.52, 0.13, 48),
        meadow=(0.74, 0.12, 95),
        water=(0.55, 0.08, 205),
    ),
    Mood(  # night
        zenith=(0.22, 0.07, 275),
        horizon=(0.45, 0.10, 265),
        cloud=(0.52, 0.07, 280),
        far_hill=(0.34, 0.06, 270),
        near_hill=(0.22, 0.04, 255),
        meadow=(0.36, 0.06, 165),
        water=(0.33, 0.08, 255),
    ),
)


def draw_background(
    rng: np.random.Generator, *, height: int, width: int
) -> tuple[Array, np.ndarray]:
    """Draw the stuff of one scene.

    Args:
        rng: source of randomness.
        height: H, pixels.
        width: W, pixels.

    Returns:
        Image [H, W, 3] float32 about 0..1, and category ids [H, W] uint8; every pixel is labelled.
    """
    if rng.random() < 0.62:
        return _landscape(rng, height, width)
    return _room(rng, height, width)


def _shifted(lch: Lch, hue: float, lightness: float = 0.0) -> Lch:
    return (lch[0] + lightness, lch[1], lch[2] + hue)


def _axes(height: int, width: int) -> tuple[Array, Array]:
    """Row and column coordinates in units."""
    unit = np.float32(min(height, width) / 256.0)
    return (
        np.arange(height, dtype=np.float32) / unit,
        np.arange(width, dtype=np.float32) / unit,
    )


# Landscape


def _landscape(rng: np.random.Generator, height: int, width: int) -> tuple[Array, np.ndarray]:
    mood = MOODS[int(rng.integers(len(MOODS)))]
    hue = float(rng.uniform(-12, 12))
    ys, xs = _axes(height, width)
    horizon = float(rng.uniform(0.42, 0.64)) * float(ys[-1])
    image = _sky(rng, mood, hue, ys, xs, horizon)
    labels = np.full((height, width), CATEGORY_ID["sky"], dtype=np.uint8)
    num_ridges = int(rng.integers(1, 4))
    for k in range(num_ridges):
        nearness = (k + 1) / num_ridges
        _hills(rng, image, labels, (mood, hue, nearness), ys, xs, horizon)
    kind = rng.choice(["water", "meadow", "lake"])
    if kind != "meadow":
        _water(rng, image, labels, (mood, hue), ys, xs, horizon)
    if kind != "water":
        shore = horizon if kind == "meadow" else horizon + 0.45 * (float(ys[-1]) - horizon)
        _meadow(rng, image, labels, (mood, hue), ys, xs, shore)
    return image, labels


def _sky(
    rng: np.random.Generator, mood: Mood, hue: float, ys: Array, xs: Array, horizon: float
) -> Array:
    zenith, low = lch_to_rgb(_shifted(mood.zenith, hue)), lch_to_rgb(_shifted(mood.horizon, hue))
    down = np.broadcast_to((ys / np.float32(horizon))[:, None] ** 0.9, (len(ys), len(xs)))
    image = mix(zenith, low, np.clip(down, 0.0, 1.0))
    density = textures.octaves(rng, ys / 34.0, xs / 90.0, 4)
    cover = float(rng.uniform(0.42, 0.62))
    clouds = textures.ramp((density - np.float32(cover)) / 0.2) * 0.8
    image = mix(image, lch_to_rgb(_shifted(mood.cloud, hue)), clouds)
    sun_x = float(rng.uniform(0.1, 0.9)) * float(xs[-1])
    away = np.hypot(ys[:, None] - np.float32(0.8 * horizon), xs[None, :] - np.float32(sun_x))
    glow = np.exp(-away / 55.0) * 0.5
    return mix(image, lch_to_rgb((0.95, 0.06, mood.horizon[2])), glow)


def _curve(rng: np.random.Generator, xs: Array, cell: float) -> Array:
    """[W] rolling line in 0..1."""
    return textures.octaves(rng, np.zeros(1, dtype=np.float32), xs / np.float32(cell), 4)[0]


def _paint(
    image: Array, labels: np.ndarray, name: str, ys: Array, edge: Array, colors: Array
) -> None:
    """Cover everything below the line `edge` [W]; soft for the image, hard for the labels."""
    scale = np.float32(1.0) / (ys[1] - ys[0])
    depth = (ys[:, None] - edge) * scale
    alpha = np.clip(depth + 0.5, 0.0, 1.0)[..., None]
    image += (colors - image) * alpha
    labels[depth >= 0.0] = CATEGORY_ID[name]


def _hills(
    rng: np.random.Generator,
    image: Array,
    labels: np.ndarray,
    tint: tuple[Mood, float, float],
    ys: Array,
    xs: Array,
    horizon: float,
) -> None:
    mood, hue, nearness = tint
    rise = np.float32((0.62 - 0.38 * nearness) * horizon)
    line = _curve(rng, xs, 150.0 - 70.0 * nearness)
    edge = np.float32(horizon) - rise * (0.25 + 1.1 * line)
    far, near = lch_to_rgb(_shifted(mood.far_hill, hue)), lch_to_rgb(_shifted(mood.near_hill, hue))
    base = far + (near - far) * np.float32(nearness)
    texture = textures.octaves(rng, ys / 9.0, xs / 12.0, 3) - 0.5
    haze = np.clip((ys[:, None] - edge) / 70.0, 0.0, 1.0) * 0.16
    light = 1.0 + texture * np.float32(0.15 + 0.3 * nearness) + haze
    _paint(image, labels, "hills", ys, edge, base * light[..., None])


def _water(
    rng: np.random.Generator,
    image: Array,
    labels: np.ndarray,
    tint: tuple[Mood, float],
    ys: Array,
    xs: Array,
    horizon: float,
) -> None:
    mood, hue = tint
    below = np.maximum(ys - np.float32(horizon), 0.0)
    rows = 26.0 * np.log1p(below / 12.0)  # ripples grow towards the viewer
    ripples = textures.octaves(rng, rows.astype(np.float32) / 3.0, xs / 34.0, 3)
    glints = textures.ramp((ripples - 0.6) / 0.12)
    deep = lch_to_rgb(_shifted(mood.water, hue, -0.08))
    shine = lch_to_rgb(_shifted(mood.horizon, hue))
    fade = np.clip(below / np.float32(float(ys[-1]) - horizon), 0.0, 1.0)[:, None]
    calm = np.broadcast_to((1.0 - fade) ** 2 * 0.55, glints.shape)
    colors = mix(mix(deep, shine, calm), shine, glints * 0.45)
    colors *= (1.0 + 0.25 * (ripples - 0.5))[..., None]
    _paint(image, labels, "water", ys, np.full(len(xs), horizon, dtype=np.float32), colors)


def _meadow(
    rng: np.random.Generator,
    image: Array,
    labels: np.ndarray,
    tint: tuple[Mood, float],
    ys: Array,
    xs: Array,
    horizon: float,
) -> None:
    mood, hue = tint
    edge = np.float32(horizon) + 26.0 * (_curve(rng, xs, 120.0) - 0.5)
    below = np.maximum(ys - np.float32(horizon) + 13.0, 0.0)
    patches = textures.octaves(rng, 9.0 * np.log1p(below / 30.0).astype(np.float32), xs / 60.0, 3)
    blades = textures.value_noise(rng, ys / 6.0, xs / 1.6)
    dark = lch_to_rgb(_shifted(mood.meadow, hue + 10, -0.10))
    bright = lch_to_rgb(_shifted(mood.meadow, hue - 12, 0.08))
    colors = mix(dark, bright, textures.ramp((patches - 0.25) * 2.0))
    near = np.clip(below / 120.0, 0.15, 1.0)[:, None]
    colors *= (1.0 + 0.32 * near * (blades - 0.5))[..., None]
    _paint(image, labels, "meadow", ys, edge, colors)


# Room


def _room(rng: np.random.Generator, height: int, width: int) -> tuple[Array, np.ndarray]:
    ys, xs = _axes(height, width)
    hue = float(rng.uniform(0, 360))
    labels = np.full((height, width), CATEGORY_ID["wall"], dtype=np.uint8)
    image = _wall(rng, hue, ys, xs)
    corner = float(rng.uniform(0.55, 0.72)) * float(ys[-1])
    image *= (1.0 - 0.22 * np.exp(-np.abs(ys - np.float32(corner)) / 30.0))[:, None, None]
    board = np.float32(corner - rng.uniform(5, 11))
    trim = lch_to_rgb((float(rng.uniform(0.6, 0.95)), 0.03, hue + 40))
    _paint(image, labels, "wall", ys, np.full(width, board, dtype=np.float32), trim)
    floor = _floor(rng, hue, ys, xs, corner)
    _paint(image, labels, "floor", ys, np.full(width, corner, dtype=np.float32), floor)
    return image, labels


def _wall(rng: np.random.Generator, hue: float, ys: Array, xs: Array) -> Array:
    base = (float(rng.uniform(0.5, 0.88)), float(rng.uniform(0.03, 0.09)), hue)
    first = lch_to_rgb(base)
    step = float(rng.choice([-1, 1])) * float(rng.uniform(0.05, 0.1))
    second = lch_to_rgb(_shifted(base, float(rng.uniform(-30, 30)), step))
    pattern = _wallpaper(rng, ys, xs)
    image = mix(first, second, pattern)
    plaster = textures.octaves(rng, ys / 20.0, xs / 20.0, 4) - 0.5
    image *= (1.0 + 0.22 * plaster)[..., None]
    return image


def _wallpaper(rng: np.random.Generator, ys: Array, xs: Array) -> Array:
    """[H, W] pattern in 0..1: plain, stripes, damask dots, bricks or tall waves."""
    y, x = np.meshgrid(ys, xs, indexing="ij")
    period = float(rng.uniform(18, 34))
    kind = int(rng.integers(5))
    if kind == 0:
        return textures.octaves(rng, ys / 60.0, xs / 60.0, 2)
    if kind == 1:
        return textures.wave(x / period, 0.1)
    if kind == 2:
        offset = np.floor(y / period) % 2.0 * 0.5
        return textures.dots(y / period, x / period + offset, 0.2)
    if kind == 3:
        y, x = y / 13.0, x / 32.0
        mortar = textures.joints(y, x, width_y=0.06, width_x=0.03)
        return np.maximum(mortar, 0.5 * textures.cell_values(rng, y, x))
    return textures.wave(x / period + 0.25 * np.sin(y * np.float32(2 * np.pi / 40.0)), 0.2)


def _floor(rng: np.random.Generator, hue: float, ys: Array, xs: Array, corner: float) -> Array:
    eye = np.float32(corner - rng.uniform(70, 130))  # height of the vanishing point
    depth = np.maximum(ys - eye, 20.0)[:, None]
    across = (xs - xs[-1] * np.float32(rng.uniform(0.25, 0.75))) / depth
    along = np.broadcast_to(220.0 / depth, across.shape)
    warm = float(rng.uniform(35, 80))
    base = (float(rng.uniform(0.42, 0.72)), float(rng.uniform(0.04, 0.09)), warm)
    dark, bright = lch_to_rgb(_shifted(base, 0, -0.07)), lch_to_rgb(_shifted(base, 8, 0.07))
    kind = int(rng.integers(3))
    if kind == 0:
        pattern = _planks(rng, along, across, depth)
    elif kind == 1:
        pattern = textures.checks(along * 2.2, across * 2.2, 0.08)
        bright = lch_to_rgb((base[0] + 0.14, 0.02, hue))
    else:
        pattern = textures.octaves(rng, ys / 5.0, xs / 9.0, 4)
    colors = mix(dark, bright, pattern)
    grain = textures.octaves(rng, ys / 3.0, xs / 26.0, 3) - 0.5
    light = 0.86 + 0.2 * np.clip((ys - np.float32(corner)) / 60.0, 0.0, 1.0)[:, None]
    colors *= (light + 0.25 * grain)[..., None]
    return colors


def _planks(rng: np.random.Generator, along: Array, across: Array, depth: Array) -> Array:
    course, brick = across * 7.0, along * 1.3
    tone = textures.cell_values(rng, course, brick)
    seam = textures.joints(course, brick, width_y=4.0 / depth, width_x=220.0 / depth**2)
    return tone * (1.0 - seam) - 0.8 * seam
