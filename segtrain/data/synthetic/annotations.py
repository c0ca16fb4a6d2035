"""Ground truth of scenes in the COCO formats: instances as exact run lengths, panoptic segments."""

from typing import Any

import numpy as np

from segtrain.data.synthetic.categories import CATEGORIES, THINGS, Category
from segtrain.data.synthetic.scene import Scene

Json = dict[str, Any]
_SEGMENT_BASE = 1000  # panoptic id = category id * 1000 + instance id (0 for stuff)


def run_lengths(mask: np.ndarray) -> list[int]:
    """Encode a mask as COCO's uncompressed run lengths.

    Args:
        mask: [H, W] bool.

    Returns:
        Lengths of alternating runs in column-major order, the first run counts zeros.
    """
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges = np.concatenate([[0], changes, [flat.size]])
    counts = np.diff(edges).tolist()
    return [0, *counts] if flat[0] else counts


def image_entry(*, index: int, file_name: str, scene: Scene) -> Json:
    """Build the COCO `images` entry of a scene.

    Args:
        index: number of the scene; the id is index + 1.
        file_name: name of the image file.
        scene: the scene.

    Returns:
        The entry.
    """
    height, width = scene.semantic.shape
    return {
        "id": index + 1,
        "file_name": file_name,
        "height": height,
        "width": width,
        "license": 1,
    }


def instance_entries(*, index: int, scene: Scene) -> list[Json]:
    """Build the COCO `annotations` entries of a scene.

    Args:
        index: number of the scene; ids are (index + 1) * 100 + instance id.
        scene: the scene.

    Returns:
        One entry per thing: exact mask, its area in pixels and its bounding box x, y, w, h.
    """
    height, width = scene.semantic.shape
    return [
        {
            "id": (index + 1) * 100 + thing.instance_id,
            "image_id": index + 1,
            "category_id": thing.category_id,
            "iscrowd": 0,
            "area": thing.area,
            "bbox": list(thing.bbox),
            "segmentation": {
                "size": [height, width],
                "counts": run_lengths(scene.instance == thing.instance_id),
            },
        }
        for thing in scene.objects
    ]


def panoptic_map(scene: Scene) -> np.ndarray:
    """Number the segments of a scene.

    Args:
        scene: the scene.

    Returns:
        [H, W] uint32, category id * 1000 + instance id; no pixel is void.
    """
    return scene.semantic.astype(np.uint32) * _SEGMENT_BASE + scene.instance


def panoptic_entry(*, index: int, file_name: str, segments: np.ndarray) -> Json:
    """Build the COCO panoptic entry of a scene.

    Args:
        index: number of the scene.
        file_name: name of the PNG with the segment ids.
        segments: [H, W] result of `panoptic_map`.

    Returns:
        The entry, segments in order of their ids.
    """
    return {
        "image_id": index + 1,
        "file_name": file_name,
        "segments_info": [_segment(segments, int(k)) for k in np.unique(segments)],
    }


def _segment(segments: np.ndarray, segment_id: int) -> Json:
    mask = segments == segment_id
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return {
        "id": segment_id,
        "category_id": segment_id // _SEGMENT_BASE,
        "iscrowd": 0,
        "area": int(np.count_nonzero(mask)),
        "bbox": [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1],
    }


def segments_to_rgb(segments: np.ndarray) -> np.ndarray:
    """Encode segment ids as COCO panoptic colours.

    Args:
        segments: [H, W] ids below 2^24.

    Returns:
        [H, W, 3] uint8 with id = R + 256 G + 65536 B.
    """
    parts = [(segments >> shift) & 255 for shift in (0, 8, 16)]
    return np.stack(parts, axis=-1).astype(np.uint8)


def coco_document(
    *, images: list[Json], annotations: list[Json], seed: int, panoptic: bool
) -> Json:
    """Assemble one annotation file.

    Args:
        images: `images` entries.
        annotations: instance or panoptic entries.
        seed: seed of the data set, for the description.
        panoptic: True lists all categories with `isthing`, False the things alone.

    Returns:
        The document; it holds no date, so that equal requests give equal files.
    """
    return {
        "info": {
            "description": f"Synthetic scenes by segtrain, seed {seed}",
            "version": "1.0",
            "contributor": "segtrain data synth",
        },
        "licenses": [{"id": 1, "name": "Generated; contains no third-party material", "url": ""}],
        "categories": [_category_entry(c, panoptic) for c in (CATEGORIES if panoptic else THINGS)],
        "images": images,
        "annotations": annotations,
    }


def _category_entry(category: Category, panoptic: bool) -> Json:
    entry: Json = {
        "id": category.id,
        "name": category.name,
        "supercategory": "thing" if category.isthing else "stuff",
    }
    if panoptic:
        entry |= {"isthing": int(category.isthing), "color": list(category.color)}
    return entry
