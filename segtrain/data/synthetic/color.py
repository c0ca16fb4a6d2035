"""Colours in OKLCH, where equal steps look equal; images are sRGB floats in 0..1.

Conversion constants: B. Ottosson, "A perceptual color space for image processing" (2020).
"""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Lch = tuple[float, float, float]


def lch_to_rgb(lch: Lch) -> Array:
    """Convert one OKLCH colour to sRGB; chroma yields where the gamut ends, hue does not.

    Args:
        lch: lightness 0..1, chroma 0..0.4, hue in degrees.

    Returns:
        [3] float32 in 0..1.
    """
    lightness, chroma, hue = lch
    for share in (1.0, 0.85, 0.7, 0.55, 0.4, 0.25):
        linear = _lch_to_linear(lightness, chroma * share, math.radians(hue))
        if min(linear) >= -1e-3 and max(linear) <= 1.001:
            break
    return np.array([_encode(value) for value in linear], dtype=np.float32)


def _lch_to_linear(lightness: float, chroma: float, hue: float) -> tuple[float, float, float]:
    a, b = chroma * math.cos(hue), chroma * math.sin(hue)
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )


def _encode(linear: float) -> float:
    """The sRGB curve, for one channel."""
    value = min(max(linear, 0.0), 1.0)
    return 12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055


def rgb_to_lab(rgb: Array) -> Array:
    """Convert one sRGB colour to OKLab.

    Args:
        rgb: [3] in 0..1.

    Returns:
        [3] float32: lightness 0..1, then the two opponent axes, about -0.4..0.4.
    """
    value = rgb.astype(np.float64)
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    red, green, blue = linear
    long = np.cbrt(0.4122214708 * red + 0.5363325363 * green + 0.0514459929 * blue)
    medium = np.cbrt(0.2119034982 * red + 0.6806995451 * green + 0.1073969566 * blue)
    short = np.cbrt(0.0883024619 * red + 0.2817188376 * green + 0.6299787005 * blue)
    lab = [
        0.2104542553 * long + 0.7936177850 * medium - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * medium + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * medium - 0.8086757660 * short,
    ]
    return np.array(lab, dtype=np.float32)


def mix(first: Array, second: Array, amount: Array) -> Array:
    """Blend two colours or colour maps.

    Args:
        first: [3] or [3, H, W], shown where amount is 0.
        second: [3] or [3, H, W], shown where amount is 1.
        amount: [H, W] in 0..1.

    Returns:
        [3, H, W] float32.
    """
    start = plane(first) if first.ndim == 1 else first
    end = plane(second) if second.ndim == 1 else second
    blend = (end - start) * amount
    blend += start
    return blend


def plane(rgb: Array) -> Array:
    """Give one colour [3] the shape [3, 1, 1] of a map."""
    return rgb[:, None, None]


def shifted(lch: Lch, *, hue: float = 0.0, lightness: float = 0.0) -> Lch:
    """Move a colour in hue (degrees) and lightness."""
    return (lch[0] + lightness, lch[1], lch[2] + hue)
