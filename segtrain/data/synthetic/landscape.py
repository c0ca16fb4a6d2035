"""Landscapes: sky, ridges of hills, then water, a meadow, or a lake with a shore."""

import numpy as np

from segtrain.data.synthetic import textures
from segtrain.data.synthetic.canvas import Canvas
from segtrain.data.synthetic.categories import CATEGORY_ID
from segtrain.data.synthetic.color import Array, lch_to_rgb, mix, plane, shifted
from segtrain.data.synthetic.moods import MOODS, Mood


def draw_landscape(rng: np.random.Generator, canvas: Canvas) -> None:
    """Draw a landscape.

    Args:
        rng: source of randomness.
        canvas: drawn and labelled in place, every pixel.
    """
    mood = MOODS[int(rng.integers(len(MOODS)))]
    hue = float(rng.uniform(-12, 12))
    horizon = float(rng.uniform(0.42, 0.64)) * canvas.bottom
    _draw_sky(rng, canvas, mood, hue, horizon)
    num_ridges = int(rng.integers(1, 4))
    for k in range(num_ridges):
        _draw_hills(rng, canvas, mood, hue, horizon, (k + 1) / num_ridges)
    kind = int(rng.integers(3))
    if kind != 0:
        _draw_water(rng, canvas, mood, hue, horizon)
    if kind != 1:
        shore = horizon if kind == 0 else horizon + 0.45 * (canvas.bottom - horizon)
        _draw_meadow(rng, canvas, mood, hue, shore)


def _draw_sky(
    rng: np.random.Generator, canvas: Canvas, mood: Mood, hue: float, horizon: float
) -> None:
    ys, xs = canvas.ys, canvas.xs
    down = np.clip(ys / np.float32(horizon), 0.0, 1.0) ** np.float32(0.9)
    image = mix(
        lch_to_rgb(shifted(mood.zenith, hue=hue)),
        lch_to_rgb(shifted(mood.horizon, hue=hue)),
        down[:, None],
    )
    density = textures.octaves(rng, ys / 34.0, xs / 90.0, 4)
    cover = np.float32(rng.uniform(0.42, 0.62))
    clouds = textures.ramp((density - cover) / 0.2) * 0.8
    image = mix(image, lch_to_rgb(shifted(mood.cloud, hue=hue)), clouds)
    sun_x = np.float32(rng.uniform(0.1, 0.9)) * xs[-1]
    away = np.hypot(ys[:, None] - np.float32(0.8 * horizon), xs - sun_x)
    glow = np.exp(-away / 55.0) * 0.5
    canvas.image[...] = mix(image, lch_to_rgb((0.95, 0.06, mood.horizon[2])), glow)
    canvas.labels[...] = CATEGORY_ID["sky"]


def _rolling_line(rng: np.random.Generator, xs: Array, cell: float) -> Array:
    """[W] line in 0..1."""
    return textures.octaves(rng, np.zeros(1, dtype=np.float32), xs / np.float32(cell), 4)[0]


def _draw_hills(
    rng: np.random.Generator,
    canvas: Canvas,
    mood: Mood,
    hue: float,
    horizon: float,
    nearness: float,
) -> None:
    rise = np.float32((0.62 - 0.38 * nearness) * horizon)
    line = _rolling_line(rng, canvas.xs, 150.0 - 70.0 * nearness)
    edge = np.float32(horizon) - rise * (0.25 + 1.1 * line)
    part = canvas.below(float(edge.min()))
    far = lch_to_rgb(shifted(mood.far_hill, hue=hue))
    near = lch_to_rgb(shifted(mood.near_hill, hue=hue))
    texture = textures.octaves(rng, part.ys / 9.0, part.xs / 12.0, 3) - 0.5
    haze = np.clip((part.ys[:, None] - edge) / 70.0, 0.0, 1.0) * 0.16
    light = 1.0 + texture * np.float32(0.15 + 0.3 * nearness) + haze
    part.cover("hills", edge, plane(far + (near - far) * np.float32(nearness)) * light)


def _draw_water(
    rng: np.random.Generator, canvas: Canvas, mood: Mood, hue: float, horizon: float
) -> None:
    part = canvas.below(horizon)
    below = np.maximum(part.ys - np.float32(horizon), 0.0)
    rows = 26.0 * np.log1p(below / 12.0)  # ripples grow towards the viewer
    ripples = textures.octaves(rng, rows / 3.0, part.xs / 34.0, 3)
    glints = textures.ramp((ripples - 0.6) / 0.12)
    deep = lch_to_rgb(shifted(mood.water, hue=hue, lightness=-0.08))
    shine = lch_to_rgb(shifted(mood.horizon, hue=hue))
    fade = np.clip(below / np.float32(canvas.bottom - horizon), 0.0, 1.0)[:, None]
    colors = mix(mix(deep, shine, (1.0 - fade) ** 2 * 0.55), shine, glints * 0.45)
    colors *= 1.0 + 0.25 * (ripples - 0.5)
    part.cover("water", part.level(horizon), colors)


def _draw_meadow(
    rng: np.random.Generator, canvas: Canvas, mood: Mood, hue: float, horizon: float
) -> None:
    edge = np.float32(horizon) + 26.0 * (_rolling_line(rng, canvas.xs, 120.0) - 0.5)
    part = canvas.below(float(edge.min()))
    below = np.maximum(part.ys - np.float32(horizon) + 13.0, 0.0)
    patches = textures.octaves(rng, 9.0 * np.log1p(below / 30.0), part.xs / 60.0, 3)
    blades = textures.value_noise(rng, part.ys / 6.0, part.xs / 1.6)
    dark = lch_to_rgb(shifted(mood.meadow, hue=hue + 10, lightness=-0.10))
    bright = lch_to_rgb(shifted(mood.meadow, hue=hue - 12, lightness=0.08))
    colors = mix(dark, bright, textures.ramp((patches - 0.25) * 2.0))
    near = np.clip(below / 120.0, 0.15, 1.0)[:, None]
    colors *= 1.0 + 0.32 * near * (blades - 0.5)
    part.cover("meadow", edge, colors)
