"""Paint things with colour, texture, relief and shadow, then light the scene like a camera would.

Images are planar, [3, H, W] sRGB floats about 0..1. Light is a unit vector (x, y) that points from
the scene towards the lamp, y down.
"""

import numpy as np

from segtrain.data.synthetic import textures
from segtrain.data.synthetic.color import Array, Lch, lch_to_rgb, mix, rgb_to_lab
from segtrain.data.synthetic.layout import Placement, clip_window
from segtrain.data.synthetic.shapes import Patch

_MIN_CONTRAST = 0.2  # OKLab distance between a thing and what it lies on
_NUM_COLORS = 8


def shadow_margin(height: int, width: int) -> int:
    """Pixels a patch must extend beyond its shape to hold the shadow."""
    return int(np.ceil(14.0 * min(height, width) / 256.0)) + 2


def paint_thing(
    rng: np.random.Generator, image: Array, placement: Placement, light: tuple[float, float]
) -> None:
    """Paint one thing over what is there, in place.

    Args:
        rng: source of randomness.
        image: [3, H, W], changed in place.
        placement: the thing.
        light: direction to the lamp.
    """
    patch = placement.patch
    height, width = image.shape[1:]
    frame, part = clip_window(
        top=placement.top,
        left=placement.left,
        side=patch.distance.shape[0],
        height=height,
        width=width,
    )
    main = _contrasting_color(rng, image[:, *frame].mean(axis=(1, 2)))
    _cast_shadow(rng, image, placement, light)
    colors = _surface(rng, patch, main) * _relief(patch, light)
    alpha = np.clip(0.5 - patch.distance[part], 0.0, 1.0)
    image[:, *frame] += (colors[:, *part] - image[:, *frame]) * alpha


def _contrasting_color(rng: np.random.Generator, behind: Array) -> Lch:
    """First of a few random colours that stands out, else the one that does so most."""
    lab = rgb_to_lab(np.clip(behind, 0.0, 1.0))
    lightness = rng.uniform(0.44, 0.92, _NUM_COLORS)
    chroma = rng.uniform(0.09, 0.22, _NUM_COLORS)
    hue = rng.uniform(0.0, 360.0, _NUM_COLORS)
    colors = [
        (float(a), float(b), float(c)) for a, b, c in zip(lightness, chroma, hue, strict=True)
    ]
    contrast = [float(np.linalg.norm(rgb_to_lab(lch_to_rgb(c)) - lab)) for c in colors]
    good = [k for k, value in enumerate(contrast) if value >= _MIN_CONTRAST]
    return colors[good[0] if good else int(np.argmax(contrast))]


def _surface(rng: np.random.Generator, patch: Patch, main: Lch) -> Array:
    """[3, P, P] colours of a shape: its main colour with a pattern in a related one."""
    step = -0.16 if main[0] > 0.62 else 0.16
    related = (main[0] + step, main[1], main[2] + float(rng.uniform(-50, 50)))
    pattern = _pattern(rng, patch) * np.float32(rng.uniform(0.55, 1.0))
    return mix(lch_to_rgb(main), lch_to_rgb(related), pattern)


def _pattern(rng: np.random.Generator, patch: Patch) -> Array:
    """[P, P] pattern in 0..1: plain, gradient, stripes, dots, checks, marble, speckles."""
    kind = int(rng.integers(7))
    most = max(1.0, patch.radius / 5.0)  # cells per radius that still resolve
    frequency = min(float(rng.uniform(1.2, 3.2)), most)
    turn = float(rng.uniform(0.0, np.pi))
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    x = (patch.u * cos + patch.v * sin) * np.float32(frequency)
    y = (patch.v * cos - patch.u * sin) * np.float32(frequency)
    if kind == 0:
        return np.zeros_like(x)
    if kind == 1:
        return np.clip(0.5 + 0.5 * patch.v, 0.0, 1.0)
    if kind == 2:
        return textures.wave(x, 0.15)
    if kind == 3:
        return textures.dots(y, x, 0.28)
    if kind == 4:
        return textures.checks(y * 0.6, x * 0.6, 0.12)
    axis = np.arange(x.shape[0], dtype=np.float32) / np.float32(patch.radius)
    if kind == 5:
        veins = textures.octaves(rng, axis * 2.0, axis * 2.0, 4)
        return textures.ramp(1.0 - np.abs(veins - 0.5) * 7.0)
    return textures.ramp((textures.value_noise(rng, axis * 9.0, axis * 9.0) - 0.62) * 6.0)


def _relief(patch: Patch, light: tuple[float, float]) -> Array:
    """[P, P] brightness of a softly bevelled surface."""
    bevel = np.float32(min(max(0.22 * patch.radius, 1.5), 9.0))
    slope = np.clip(1.0 + patch.distance / bevel, 0.0, 1.0) ** 2
    down, right = np.gradient(patch.distance)
    facing = right * np.float32(light[0]) + down * np.float32(light[1])
    return 1.0 + 0.34 * slope * facing


def _cast_shadow(
    rng: np.random.Generator, image: Array, placement: Placement, light: tuple[float, float]
) -> None:
    height, width = image.shape[1:]
    unit = min(height, width) / 256.0
    lift = float(rng.uniform(2.0, 6.0)) * unit
    distance = placement.patch.distance
    frame, part = clip_window(
        top=placement.top - round(light[1] * lift),
        left=placement.left - round(light[0] * lift),
        side=distance.shape[0],
        height=height,
        width=width,
    )
    softness = np.float32(max(1.3 * lift, 1.0))
    shade = textures.ramp(0.5 - distance[part] / (2.0 * softness))
    image[:, *frame] *= 1.0 - np.float32(0.42) * shade


def light_scene(rng: np.random.Generator, image: Array, light: tuple[float, float]) -> Array:
    """Add a lighting gradient, soft shade, a little blur and sensor noise.

    Args:
        rng: source of randomness.
        image: [3, H, W] about 0..1; not changed.
        light: direction to the lamp.

    Returns:
        [H, W, 3] uint8.
    """
    height, width = image.shape[1:]
    y = np.linspace(-1.0, 1.0, height, dtype=np.float32)
    x = np.linspace(-1.0, 1.0, width, dtype=np.float32)
    tilt = np.float32(rng.uniform(0.02, 0.12))
    gain = 1.0 + tilt * (x * np.float32(light[0]) + (y * np.float32(light[1]))[:, None])
    gain -= np.float32(rng.uniform(0.02, 0.09)) * (x * x + (y * y)[:, None])
    if rng.random() < 0.35:
        cover = textures.octaves(rng, y * 1.6, x * 1.6, 2)
        gain *= 1.0 - 0.18 * textures.ramp((cover - 0.5) / 0.12)
    lit = _blur(image * (255.0 * gain), float(rng.uniform(0.0, 0.11)))
    noise = rng.standard_normal(lit.shape, dtype=np.float32)
    noise *= np.float32(rng.uniform(0.6, 3.2))
    noise += lit
    np.clip(np.rint(noise, out=noise), 0.0, 255.0, out=noise)
    return np.ascontiguousarray(noise.astype(np.uint8).transpose(1, 2, 0))


def _blur(image: Array, amount: float) -> Array:
    """Separable three-tap blur; `amount` is the weight of each neighbour, edges repeat."""
    for axis in (1, 2):
        size = image.shape[axis]
        before, after = (
            np.maximum(np.arange(size) - 1, 0),
            np.minimum(np.arange(size) + 1, size - 1),
        )
        sides = np.take(image, before, axis=axis)
        sides += np.take(image, after, axis=axis)
        sides *= np.float32(amount)
        image = image * np.float32(1.0 - 2.0 * amount)
        image += sides
    return image
