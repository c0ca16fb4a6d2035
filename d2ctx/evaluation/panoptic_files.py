"""COCO's panoptic format: a json beside a folder of PNGs, id = R + 256 G + 65536 B, 0 is void."""

import io
import json
import os
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from d2ctx.errors import UserError
from d2ctx.evaluation.panoptic_quality import CategoryCounts, add_counts, count_image, summarize
from d2ctx.files import write_bytes
from d2ctx.wording import first_of, plural

# Decoders of damaged images raise whatever they like.
BROKEN_IMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    Image.DecompressionBombError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
WORKERS = min(8, os.cpu_count() or 1)


def rgb_to_ids(rgb: np.ndarray) -> np.ndarray:
    """Segment ids of a decoded PNG.

    Args:
        rgb: [H, W, 3] bytes.

    Returns:
        [H, W] ids, int32.
    """
    four = np.zeros((*rgb.shape[:-1], 4), np.uint8)
    four[..., :3] = rgb
    return four.view("<i4")[..., 0].astype(np.int32, copy=False)


def ids_to_rgb(ids: np.ndarray) -> np.ndarray:
    """What `rgb_to_ids` reads.

    Args:
        ids: [H, W] ids, 0..2^24 - 1.

    Returns:
        [H, W, 3] bytes.

    Raises:
        ValueError: If an id does not fit into three bytes.
    """
    if ids.size and (ids.min() < 0 or ids.max() >= 1 << 24):
        raise ValueError(f"segment ids must lie in 0..{2**24 - 1}, got {ids.min()}..{ids.max()}")
    return np.stack([ids & 255, (ids >> 8) & 255, ids >> 16], axis=-1).astype(np.uint8)


class BadPngError(UserError):
    """A PNG that is absent or no panoptic one.

    Attributes:
        reason: What is wrong, without the file.
    """

    def __init__(self, path: Path, reason: str, fix: str):
        super().__init__(f"{path} {reason}; {fix}")
        self.reason = reason


def read_ids(path: Path) -> np.ndarray:
    """Read the segment ids of a panoptic PNG.

    Args:
        path: The file.

    Returns:
        [H, W] ids, int32.

    Raises:
        BadPngError: If the file is absent, broken, or no 8-bit RGB image.
    """
    again = "write it again"
    try:
        if not path.is_file():  # a pipe would be waited for
            raise FileNotFoundError(path)
        with Image.open(path) as image:
            mode = image.mode
            pixels = np.asarray(image)
    except FileNotFoundError:
        raise BadPngError(path, "does not exist", "write one PNG for each annotation") from None
    except UnidentifiedImageError:
        raise BadPngError(path, "is no image", again) from None
    except BROKEN_IMAGE as error:
        raise BadPngError(path, f"cannot be decoded ({error})", again) from None
    if mode != "RGB":
        reason = f"has mode {mode}, expected RGB with id = R + 256 G + 65536 B"
        raise BadPngError(path, reason, "write ids as 8-bit RGB")
    return rgb_to_ids(pixels)


def write_ids(path: Path, ids: np.ndarray) -> None:
    """Write a panoptic PNG, never half.

    Args:
        path: The file.
        ids: [H, W] ids.
    """
    write_png(path, ids_to_rgb(ids))


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write an image, never half.

    Args:
        path: The file.
        pixels: [H, W] or [H, W, 3] bytes.
    """
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())


def read_json(path: Path) -> Any:
    """Read a json file.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        UserError: If it is absent or no json.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; mend the path") from None
    except (RecursionError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} is no valid json ({reason}); write it again") from None


def panoptic_quality(
    *,
    truth: Mapping[str, Any],
    truth_root: Path,
    predicted: Mapping[str, Any],
    predicted_root: Path,
    workers: int = WORKERS,
) -> dict[str, Any]:
    """Panoptic quality of a folder of predictions.

    Args:
        truth: Panoptic json of the ground truth: annotations and categories.
        truth_root: Folder of its PNGs.
        predicted: Panoptic json of the predictions: annotations.
        predicted_root: Folder of their PNGs.
        workers: Threads.

    Returns:
        See `d2ctx.evaluation.panoptic_quality.summarize`.

    Raises:
        UserError: If an image has no prediction, or a json and its PNG disagree.
    """
    counts = count_images(
        truth=truth,
        truth_root=truth_root,
        predicted=predicted,
        predicted_root=predicted_root,
        workers=workers,
    )
    return summarize(add_counts(counts), truth["categories"])


def count_images(
    *,
    truth: Mapping[str, Any],
    truth_root: Path,
    predicted: Mapping[str, Any],
    predicted_root: Path,
    workers: int = WORKERS,
) -> list[dict[int, CategoryCounts]]:
    """Counts of every image of a folder of predictions.

    Args:
        truth: Panoptic json of the ground truth: annotations and categories.
        truth_root: Folder of its PNGs.
        predicted: Panoptic json of the predictions: annotations.
        predicted_root: Folder of their PNGs.
        workers: Threads.

    Returns:
        Category id -> counts, for each annotation of the ground truth.

    Raises:
        UserError: If an image has no prediction, or a json and its PNG disagree.
    """
    categories = [category["id"] for category in truth["categories"]]

    def count(pair: tuple[Mapping[str, Any], Mapping[str, Any]]) -> dict[int, CategoryCounts]:
        mine, theirs = pair
        return count_image(
            truth_ids=read_ids(truth_root / mine["file_name"]),
            predicted_ids=read_ids(predicted_root / theirs["file_name"]),
            truth=mine["segments_info"],
            predicted=theirs["segments_info"],
            categories=categories,
            name=f"image {mine['image_id']} ({theirs['file_name']})",
        )

    pairs = _pairs(truth["annotations"], predicted["annotations"])
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(count, pairs))


def _pairs(
    truth: Iterable[Mapping[str, Any]], predicted: Sequence[Mapping[str, Any]]
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    by_image = {annotation["image_id"]: annotation for annotation in predicted}
    listed = list(truth)
    absent = [a["image_id"] for a in listed if a["image_id"] not in by_image]
    if absent:
        raise UserError(
            f"{plural(len(absent), 'image')} of {len(listed)} have no prediction "
            f"({first_of(absent)}); predict every image of the set, an empty one too"
        )
    return [(annotation, by_image[annotation["image_id"]]) for annotation in listed]
