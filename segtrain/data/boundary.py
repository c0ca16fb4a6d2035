"""Boundary and direction targets of a label crop, by distance transform (UN-EPT, Sec. 3.2; SegFix).

Computed online, behind all augmentation: distances depend on the scale, directions on flips.

Letters: H W crop, e distance map of one class, (gy, gx) its gradient, y down.
"""

from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segtrain.data.labels import IGNORE_INDEX

# Distance of a class that fills the crop, to whose border no finite distance exists.
FAR = 250.0
# A shorter gradient has no direction.
MIN_GRADIENT = 1e-3


@dataclass(frozen=True)
class BoundaryTargets:
    """What the boundary and the direction head shall say.

    Attributes:
        boundary: uint8 [H, W]: 1 boundary, 0 interior, 255 ignore.
        direction: uint8 [H, W]: bin 0..7 (see `ctxops.boundary`) towards the interior, 255 ignore.
    """

    boundary: NDArray[np.uint8]
    direction: NDArray[np.uint8]


def boundary_targets(
    labels: NDArray[np.integer],
    *,
    ignore_index: int = IGNORE_INDEX,
    max_distance: int = 5,
    min_area: int = 100,
) -> BoundaryTargets:
    """Targets of one augmented crop.

    For every class, e is the exact Euclidean distance to the nearest pixel of anything else, void
    included; the border of the crop is no boundary. Boundary is e < max_distance + 1, a band on
    both sides of every border. The direction is the bin of atan2(gy, gx).

    Deviation: a pixel whose gradient vanishes (the middle of a strip) has no direction and is
    ignored; the released code makes it bin 4, right, which no flip maps to itself.

    Args:
        labels: Integers [H, W].
        ignore_index: Label of void.
        max_distance: Width of the band, in pixels.
        min_area: Classes with fewer pixels in the crop are ignored in both targets.

    Returns:
        The two maps; 255 for void and small classes.

    Raises:
        TypeError: If `labels` is not an integer array.
        ValueError: If `labels` is not [H, W] or has negative values, `max_distance` is below 1, or
            `min_area` below 0.
        ModuleNotFoundError: If OpenCV is missing.
    """
    _check(labels, max_distance, min_area)
    _cv2()  # Where it is missing, the first crop shall say so, whatever it shows.
    counted = np.zeros(labels.shape, bool)
    distance, gy, gx = np.zeros((3, *labels.shape), np.float32)
    for label in _classes(labels, ignore_index, min_area):
        mask = np.equal(labels, label)
        box = _grown_box(mask)
        inside = mask[box]
        part = distance_inside(inside)
        for whole, values in zip((distance, gy, gx), (part, *gradient(part)), strict=True):
            np.copyto(whole[box], values, where=inside)
        counted |= mask
    boundary = (distance < max_distance + 1).astype(np.uint8)
    boundary[~counted] = IGNORE_INDEX
    # Where nothing was written, the gradient is zero, and so has no direction.
    return BoundaryTargets(boundary=boundary, direction=bin_of_gradient(gy, gx))


@dataclass(frozen=True, kw_only=True)
class BoundaryLabels:
    """`boundary_targets` of a tensor, as a data set wants it.

    Attributes:
        max_distance: As in `boundary_targets`.
        min_area: As in `boundary_targets`.
    """

    max_distance: int
    min_area: int

    def __call__(self, label: Tensor) -> dict[str, Tensor]:
        """Compute them.

        Args:
            label: Integers [H, W], 255 ignored.

        Returns:
            "boundary" and "direction", uint8 [H, W].
        """
        found = boundary_targets(
            label.numpy(), max_distance=self.max_distance, min_area=self.min_area
        )
        return {
            "boundary": torch.from_numpy(found.boundary),
            "direction": torch.from_numpy(found.direction),
        }


def distance_inside(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Exact Euclidean distance of every pixel of a mask to the nearest one outside.

    Args:
        mask: [H, W].

    Returns:
        [H, W]: 0 outside, from 1 inside; 250 everywhere where nothing is outside.

    Raises:
        ModuleNotFoundError: If OpenCV is missing.
    """
    if mask.all():
        return np.full(mask.shape, FAR, np.float32)
    cv2 = _cv2()
    return cv2.distanceTransform(mask.view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def gradient(distance: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Sums over 5 x 5 windows of distance times (y, x) / (x^2 + y^2), with zeros around the map.

    Args:
        distance: [H, W], zero outside the class.

    Returns:
        (gy, gx), each [H, W]; they point where the distance grows. Meaningless outside the class.

    Raises:
        ModuleNotFoundError: If OpenCV is missing.
    """
    cv2 = _cv2()
    y, x = np.mgrid[-2:3, -2:3].astype(np.float32)
    square = np.maximum(x**2 + y**2, 1)
    gy, gx = (
        cv2.filter2D(distance, cv2.CV_32F, kernel / square, borderType=cv2.BORDER_CONSTANT)
        for kernel in (y, x)
    )
    return gy, gx


def bin_of_gradient(gy: NDArray[np.float32], gx: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Direction bin of atan2(gy, gx); the numbers of `ctxops.bin_of_angle`.

    Args:
        gy: [H, W], y down.
        gx: [H, W].

    Returns:
        uint8 [H, W]: 0..7, or 255 where both vanish.
    """
    eighths = np.arctan2(gy, gx) * np.float32(4 / np.pi)  # of a turn, in [-4, 4]
    bins = np.ceil(eighths + np.float32(3.5)).astype(np.uint8) % 8
    bins[gy**2 + gx**2 < MIN_GRADIENT**2] = IGNORE_INDEX
    return bins


def _check(labels: NDArray[np.integer], max_distance: int, min_area: int) -> None:
    """Refuse what is no label crop."""
    if not isinstance(labels, np.ndarray) or not np.issubdtype(labels.dtype, np.integer):
        kind = labels.dtype if isinstance(labels, np.ndarray) else type(labels).__name__
        raise TypeError(f"labels: expected an integer array [H, W], got {kind}; use np.asarray")
    if labels.ndim != 2 or labels.size == 0:
        raise ValueError(
            f"labels: expected a non-empty crop [H, W], got shape {labels.shape}; "
            "drop a channel axis with labels[..., 0]"
        )
    if labels.min() < 0:
        raise ValueError(
            f"labels: expected none below 0, got {labels.min()}; make void {IGNORE_INDEX}"
        )
    if max_distance < 1 or min_area < 0:
        raise ValueError(
            f"max_distance, min_area: expected at least 1 and 0, got {max_distance} and "
            f"{min_area}; 5 and 100 are usual"
        )


def _classes(labels: NDArray[np.integer], ignore_index: int, min_area: int) -> list[int]:
    """Classes that are present with enough pixels."""
    areas = np.bincount(labels.ravel())
    present = np.flatnonzero(areas >= max(min_area, 1)).tolist()
    return [label for label in present if label != ignore_index]


def _grown_box(mask: NDArray[np.bool_]) -> tuple[slice, slice]:
    """(rows, columns) of the mask and one pixel around it, which holds the nearest outside."""
    x, y, width, height = _cv2().boundingRect(mask.view(np.uint8))
    return slice(max(y - 1, 0), y + height + 1), slice(max(x - 1, 0), x + width + 1)


def _cv2() -> ModuleType:
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "boundary targets need OpenCV; install it with: pip install 'ctxseg[seg]'"
        ) from error
    return cv2
