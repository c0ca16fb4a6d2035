"""Pictures of panoptic predictions: image, ground truth, prediction, and what differs.

Letters: H, W map; h, w panel.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import Metadata
from PIL import Image, ImageDraw, ImageFont

from d2ctx.errors import UserError
from d2ctx.evaluation.panoptic import NAME
from d2ctx.evaluation.panoptic_files import read_ids, read_json
from d2ctx.picture import (
    MISSED,
    OPACITY,
    PALETTE,
    RIGHT,
    WRONG,
    comparison_caption,
    row,
    scale_of,
)
from d2ctx.visualize_match import VOID, Comparison, compare_segments

STRIPE = 6  # width in pixels of the stripes where something wrong hides something missed


@dataclass(frozen=True)
class Side:
    """The segments of all images, of the ground truth or of the predictions.

    Attributes:
        root: Folder of the PNGs.
        annotations: By image id.
    """

    root: Path
    annotations: Mapping[int | str, Mapping[str, Any]]

    def read(self, image_id: int | str) -> tuple[np.ndarray, Sequence[Mapping[str, Any]]]:
        """Segment ids [H, W] of an image, and its `segments_info`."""
        annotation = self.annotations[image_id]
        return read_ids(self.root / annotation["file_name"]), annotation["segments_info"]


class PanopticPictures:
    """Draws the images of one evaluated data set.

    Args:
        folder: Where the evaluation wrote its predictions.
        metadata: Of the data set; names `panoptic_json` and `panoptic_root`.

    Raises:
        UserError: If a json cannot be read.
    """

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        truth = read_json(Path(metadata.panoptic_json))
        predicted = read_json(folder / f"{NAME}.json")
        self.names = {c["id"]: c["name"] for c in truth["categories"]}
        self.colors = {
            c["id"]: np.array(c.get("color", PALETTE[i % len(PALETTE)]))
            for i, c in enumerate(truth["categories"])
        }
        self.truth = Side(Path(metadata.panoptic_root), _by_image(truth.get("annotations", [])))
        self.predicted = Side(folder / NAME, _by_image(predicted["annotations"]))

    def draw(self, image: np.ndarray, image_id: int | str) -> np.ndarray:
        """One row of panels.

        Args:
            image: RGB [H, W, 3], bytes.
            image_id: Which one it is.

        Returns:
            RGB picture: the image and the prediction; where the data set has annotations, the
            ground truth between them and the differences behind.

        Raises:
            UserError: If the image was not predicted, or a PNG has another size.
        """
        if image_id not in self.predicted.annotations:
            raise UserError(f"image {image_id} has no panoptic prediction; evaluate the run again")
        ids, segments = self.predicted.read(image_id)
        _check_size(image, ids, f"the prediction of image {image_id}")
        ground, large = _enlarged(image), _enlarged(ids)
        panels = [("image", ground), ("prediction", self._segments(ground, large, segments))]
        if image_id in self.truth.annotations:
            true_ids, true_segments = self.truth.read(image_id)
            _check_size(image, true_ids, f"the ground truth of image {image_id}")
            true_large = _enlarged(true_ids)
            panels.insert(1, ("ground truth", self._segments(ground, true_large, true_segments)))
            matches, found = compare_segments(true_ids, ids, true_segments, segments)
            panels.append(
                (_caption(found), _differences(ground, true_large, large, matches, found))
            )
        return row(panels)

    def _segments(
        self, image: np.ndarray, ids: np.ndarray, segments: Sequence[Mapping[str, Any]]
    ) -> np.ndarray:
        """Every segment in the colour of its category, with a white border and its name."""
        fill = np.zeros_like(image)
        for segment in segments:
            fill[ids == segment["id"]] = self.colors[segment["category_id"]]
        panel = Image.fromarray(_blend(image, fill, ids != VOID, border=_borders(ids)))
        pen, font = ImageDraw.Draw(panel), ImageFont.load_default(12)
        for segment in segments:
            place = _inside(ids == segment["id"])
            if place is not None:
                name = self.names[segment["category_id"]]
                pen.text(place, name, "white", font, "mm", stroke_width=2, stroke_fill="black")
        return np.asarray(panel)


def _by_image(annotations: Sequence[Mapping[str, Any]]) -> dict[int | str, Mapping[str, Any]]:
    return {annotation["image_id"]: annotation for annotation in annotations}


def _check_size(image: np.ndarray, ids: np.ndarray, what: str) -> None:
    if ids.shape != image.shape[:2]:
        raise UserError(
            f"{what} is {ids.shape[1]}x{ids.shape[0]}, the image {image.shape[1]}x"
            f"{image.shape[0]}; write PNGs at the image's own size"
        )


def _differences(
    image: np.ndarray,
    truth_ids: np.ndarray,
    ids: np.ndarray,
    matches: Mapping[int, int],
    found: Comparison,
) -> np.ndarray:
    """Pixels of matches, of wrong segments, of missed ones, and of the two latter in stripes.

    Pixels stay bare where a matching segment leaves its match, and on void and crowds.
    """
    right = np.zeros(ids.shape, bool)
    for p, t in matches.items():
        right |= (ids == p) & (truth_ids == t)
    wrong = np.isin(ids, found.wrong) & (truth_ids != VOID)
    missed = np.isin(truth_ids, found.missed)
    fill = np.zeros_like(image)
    fill[right], fill[wrong] = RIGHT, WRONG
    rows, columns = np.indices(ids.shape)
    stripes = (rows + columns) // STRIPE % 2 == 0
    fill[missed & (~wrong | stripes)] = MISSED
    return _blend(image, fill, right | wrong | missed, border=_borders(truth_ids))


def _caption(found: Comparison) -> str:
    return comparison_caption(
        right=len(found.right), wrong=len(found.wrong), missed=len(found.missed)
    )


def _borders(ids: np.ndarray) -> np.ndarray:
    """[H, W] pixels whose right or lower neighbour belongs to another segment."""
    border = np.zeros(ids.shape, bool)
    border[:, :-1] |= ids[:, :-1] != ids[:, 1:]
    border[:-1] |= ids[:-1] != ids[1:]
    return border


def _inside(mask: np.ndarray) -> tuple[float, float] | None:
    """A place (x, y) in the widest run of the middle row of a mask; None where it is empty."""
    rows = np.flatnonzero(mask.any(axis=1))
    if not len(rows):
        return None
    y = rows[len(rows) // 2]
    edges = np.flatnonzero(np.diff(np.pad(mask[y].astype(np.int8), 1)))
    starts, ends = edges[::2], edges[1::2]
    widest = (ends - starts).argmax()
    return (starts[widest] + ends[widest]) / 2, y + 0.5


def _blend(
    image: np.ndarray, fill: np.ndarray, where: np.ndarray, *, border: np.ndarray
) -> np.ndarray:
    """The image with colours over some of its pixels and white borders; [h, w, 3]."""
    mixed = np.where(where[..., None], (1 - OPACITY) * image + OPACITY * fill, image)
    mixed[border] = 255
    return mixed.astype(np.uint8)


def _enlarged(pixels: np.ndarray) -> np.ndarray:
    """An image or ids [H, W, ...] at the size of a panel, [h, w, ...]."""
    height, width = pixels.shape[:2]
    scale = scale_of(width)
    rows = (np.arange(round(height * scale)) / scale).astype(int).clip(max=height - 1)
    columns = (np.arange(round(width * scale)) / scale).astype(int).clip(max=width - 1)
    return pixels[rows[:, None], columns]
