"""Rooms: a papered, bricked or plastered wall over a floor in perspective."""

import numpy as np

from segtrain.data.synthetic import textures
from segtrain.data.synthetic.canvas import Canvas
from segtrain.data.synthetic.categories import CATEGORY_ID
from segtrain.data.synthetic.color import Array, lch_to_rgb, mix, plane, shifted


def draw_room(rng: np.random.Generator, canvas: Canvas) -> None:
    """Draw a room.

    Args:
        rng: source of randomness.
        canvas: drawn and labelled in place, every pixel.
    """
    hue = float(rng.uniform(0, 360))
    corner = float(rng.uniform(0.55, 0.72)) * canvas.bottom
    canvas.labels[...] = CATEGORY_ID["wall"]
    canvas.image[...] = _wall(rng, hue, canvas.ys, canvas.xs)
    dusk = np.exp(-np.abs(canvas.ys - np.float32(corner)) / 30.0)
    canvas.image[...] *= (1.0 - 0.22 * dusk)[:, None]
    trim = lch_to_rgb((float(rng.uniform(0.8, 0.97)), 0.03, hue + 40))
    board = corner - float(rng.uniform(5, 11))
    canvas.below(board).cover("wall", canvas.level(board), plane(trim))
    part = canvas.below(corner)
    part.cover("floor", part.level(corner), _floor(rng, hue, part.ys, part.xs, corner))


def _wall(rng: np.random.Generator, hue: float, ys: Array, xs: Array) -> Array:
    base = (float(rng.uniform(0.62, 0.9)), float(rng.uniform(0.04, 0.1)), hue)
    step = float(rng.choice([-1, 1])) * float(rng.uniform(0.05, 0.1))
    other = shifted(base, hue=float(rng.uniform(-30, 30)), lightness=step)
    image = mix(lch_to_rgb(base), lch_to_rgb(other), _wallpaper(rng, ys, xs))
    image *= 0.89 + 0.22 * textures.octaves(rng, ys / 20.0, xs / 20.0, 4)
    return image


def _wallpaper(rng: np.random.Generator, ys: Array, xs: Array) -> Array:
    """[H, W] pattern in 0..1: plain, stripes, dots, bricks or tall waves."""
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
    base = (float(rng.uniform(0.52, 0.8)), float(rng.uniform(0.05, 0.1)), warm)
    dark = lch_to_rgb(shifted(base, lightness=-0.07))
    bright = lch_to_rgb(shifted(base, hue=8, lightness=0.07))
    kind = int(rng.integers(3))
    if kind == 0:
        pattern = _planks(rng, along, across, depth)
    elif kind == 1:
        pattern = textures.checks(along * 2.2, across * 2.2, 0.08)
        bright = lch_to_rgb((base[0] + 0.14, 0.02, hue))
    else:
        pattern = textures.octaves(rng, ys / 5.0, xs / 9.0, 4)
    colors = mix(dark, bright, pattern)
    grain = textures.octaves(rng, ys / 3.0, xs / 26.0, 3)
    light = 0.77 + 0.2 * np.clip((ys - np.float32(corner)) / 60.0, 0.0, 1.0)[:, None]
    colors *= light + 0.25 * grain
    return colors


def _planks(rng: np.random.Generator, along: Array, across: Array, depth: Array) -> Array:
    """[H, W] boards that run towards the vanishing point; dark seams are below 0."""
    course, brick = across * 7.0, along * 1.3
    tone = textures.cell_values(rng, course, brick)
    seam = textures.joints(course, brick, width_y=4.0 / depth, width_x=220.0 / depth**2)
    return tone * (1.0 - seam) - 0.8 * seam
