"""Colours of the landscapes, by time of day."""

from dataclasses import dataclass

from segtrain.data.synthetic.color import Lch


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
        meadow=(0.50, 0.09, 130),
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
        meadow=(0.40, 0.07, 160),
        water=(0.33, 0.08, 255),
    ),
)
