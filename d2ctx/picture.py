"""Parts of the pictures of a run: objects drawn on an image, captions, panels in a row.

Letters: H, W map.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from detectron2.utils.visualizer import Visualizer
from PIL import Image, ImageDraw, ImageFont

# Colours of a comparison, which people with any kind of colour vision can tell apart.
RIGHT, WRONG, MISSED = (0, 158, 115), (213, 94, 0), (0, 114, 178)
PALETTE = [
    (230, 82, 82),
    (76, 132, 230),
    (240, 176, 48),
    (72, 176, 104),
    (166, 96, 214),
    (52, 186, 196),
    (236, 120, 176),
    (140, 140, 60),
]
GAP = 8
CAPTION = 20  # height of the line above a panel
MIN_WIDTH = 400
OPACITY = 0.6


@dataclass(frozen=True)
class Drawn:
    """One object as it is drawn.

    Attributes:
        box: [4], corners in pixels.
        mask: [H, W], or None; drawn where it is not empty, the box otherwise.
        color: RGB, 0 to 255.
        label: Its text.
    """

    box: np.ndarray
    mask: np.ndarray | None
    color: Sequence[int]
    label: str


def scale_of(width: int) -> float:
    """Factor by which images of this width are enlarged."""
    return max(1.0, MIN_WIDTH / width)


def draw_objects(image: np.ndarray, objects: Iterable[Drawn]) -> np.ndarray:
    """Draw objects over an image, the last on top.

    Args:
        image: RGB [H, W, 3], bytes.
        objects: What to draw.

    Returns:
        RGB panel, enlarged where the image is narrow.
    """
    canvas = Visualizer(image, scale=scale_of(image.shape[1]))
    for item in objects:
        color = np.array(item.color) / 255
        if item.mask is None or not item.mask.any():
            canvas.draw_box(item.box, edge_color=color)
            canvas.draw_text(item.label, item.box[:2], color=color)
        else:  # keeps holes, unlike polygons
            canvas.draw_binary_mask(
                item.mask, color, text=item.label, alpha=OPACITY, area_threshold=0
            )
    return canvas.output.get_image()


def row(panels: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """Panels of one size side by side, each below its caption.

    Args:
        panels: Caption and RGB panel.

    Returns:
        RGB picture.
    """
    parts = []
    for caption, panel in panels:
        parts += [
            np.concatenate([_caption(caption, panel.shape[1]), panel]),
            np.full((panel.shape[0] + CAPTION, GAP, 3), 255, np.uint8),
        ]
    return np.concatenate(parts[:-1], axis=1)


def _caption(text: str, width: int) -> np.ndarray:
    line = Image.new("RGB", (width, CAPTION), "white")
    font = ImageFont.load_default(13)
    ImageDraw.Draw(line).text((2, 2), text, fill="black", font=font)
    return np.asarray(line)


def comparison_caption(*, right: int, wrong: int, missed: int) -> str:
    """What the colours of a comparison mean, and how often each occurs."""
    return f"green: {right} right, orange: {wrong} wrong, blue: {missed} missed"
