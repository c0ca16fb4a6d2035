"""Pictures of predictions: overlays, a legend, panels side by side. All RGB, uint8."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from segtrain.data.labels import IGNORE_INDEX, ClassSet, Labels

Picture = NDArray[np.uint8]

_GAP = 8  # white pixels between panels
_ROW, _PAD, _FONT_SIZE = 22, 6, 14
_INK, _PAPER = (30, 30, 30), (255, 255, 255)


def overlay(image: Picture, labels: Labels, classes: ClassSet, *, alpha: float = 0.6) -> Picture:
    """Lay the colours of the classes over an image.

    Args:
        image: [H, W, 3].
        labels: [H, W]; 255 leaves the image as it is.
        classes: With their colours.
        alpha: Share of the colour, 0 to 1.

    Returns:
        [H, W, 3].
    """
    mixed = (1 - alpha) * image + alpha * classes.paint(labels)
    known = (labels != IGNORE_INDEX)[..., None]
    return np.where(known, np.rint(mixed).astype(np.uint8), image)


def side_by_side(panels: Sequence[Picture]) -> Picture:
    """Put pictures of equal height in a row.

    Args:
        panels: [H, W, 3] each.

    Returns:
        [H, sum of W and gaps, 3].
    """
    gap = np.full((panels[0].shape[0], _GAP, 3), _PAPER[0], np.uint8)
    parts = [part for panel in panels for part in (gap, panel)]
    return np.concatenate(parts[1:], axis=1)


def with_legend(picture: Picture, classes: ClassSet, labels: Labels | None = None) -> Picture:
    """Write names and colours of classes below a picture.

    Args:
        picture: [H, W, 3].
        classes: With their colours.
        labels: Only the classes of this map are named, largest first, each with its share; None
            names all, so that every frame of a video gets the same legend.

    Returns:
        [H + rows of the legend, W, 3].
    """
    return np.concatenate([picture, legend(picture.shape[1], legend_entries(classes, labels))])


def legend_entries(
    classes: ClassSet, labels: Labels | None = None
) -> list[tuple[str, tuple[int, int, int]]]:
    """What a legend says.

    Args:
        classes: With their colours.
        labels: As in `with_legend`.

    Returns:
        Text and colour, in the order in which they are written.
    """
    if labels is None:
        return list(zip(classes.names, classes.palette, strict=True))
    area = np.bincount(labels.ravel(), minlength=IGNORE_INDEX + 1)[: len(classes)]
    order = sorted(np.flatnonzero(area), key=lambda k: (-area[k], k))
    return [
        (f"{classes.names[k]} {100 * area[k] / labels.size:.1f} %", classes.palette[k])
        for k in order
    ]


def legend(width: int, entries: Sequence[tuple[str, tuple[int, int, int]]]) -> Picture:
    """Draw a legend, as many entries in a row as fit.

    Args:
        width: Pixels.
        entries: Text and colour.

    Returns:
        [rows, width, 3].
    """
    font = ImageFont.load_default(_FONT_SIZE)
    places, x, y = [], _PAD, _PAD
    for text, _ in entries:
        needed = _ROW + int(font.getlength(text)) + 2 * _PAD
        if x > _PAD and x + needed > width:
            x, y = _PAD, y + _ROW
        places.append((x, y))
        x += needed
    canvas = Image.new("RGB", (width, y + _ROW + _PAD), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for (text, colour), (x, y) in zip(entries, places, strict=True):
        side = _ROW - _PAD
        draw.rectangle((x, y, x + side, y + side), fill=colour, outline=_INK)
        draw.text((x + _ROW, y), text, fill=_INK, font=font)
    return np.array(canvas)
