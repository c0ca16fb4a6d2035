"""Invented data sets with objects of all sizes, crowds and detections of all qualities."""

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

SIDE = 400


def invented(
    images: int = 40, *, seed: int = 0, noise: float = 0.08, decimals: int = 9, masks: bool = False
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ground truth, which depends on the seed alone, and detections that miss it by `noise`.

    Scores are rounded to `decimals`; those of one image differ by more.
    """
    rng, miss = np.random.default_rng(seed), np.random.default_rng([seed, int(1e6 * noise)])
    size = {"height": SIDE, "width": SIDE}
    truth: dict[str, Any] = {
        "images": [{"id": n + 1, **size} for n in range(images)],
        "categories": [{"id": 3 * k + 1, "name": name} for k, name in enumerate("abc")],
        "annotations": [],
    }
    found: list[dict[str, Any]] = []
    for image in truth["images"]:
        for _ in range(rng.integers(0, 6)):
            annotation = _object(rng, image["id"], len(truth["annotations"]) + 1)
            truth["annotations"].append(annotation)
            for _ in range(rng.integers(0, 3)):
                number = sum(d["image_id"] == image["id"] for d in found)
                score = round(float(miss.random()), decimals) * 0.9 + 1e-3 * number
                found.append(_detection(miss, annotation, noise, score, masks=masks))
    return truth, found


def _object(rng: np.random.Generator, image: int, number: int) -> dict[str, Any]:
    side = np.exp(rng.uniform(np.log(8), np.log(200)))
    x, y = rng.uniform(0, 100, 2)
    x, y, w, h = (float(round(v)) for v in (x, y, side, side * rng.uniform(0.6, 1.6)))
    return {
        "id": number,
        "image_id": image,
        "category_id": int(3 * rng.integers(3) + 1),
        "bbox": [x, y, w, h],
        "area": w * h * float(rng.uniform(0.5, 1)),
        "iscrowd": int(rng.random() < 0.1),
        "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
    }


def _detection(
    rng: np.random.Generator, of: dict[str, Any], noise: float, score: float, *, masks: bool
) -> dict[str, Any]:
    box = np.array(of["bbox"])
    box = box + rng.normal(0, noise, 4) * box[2:].max()
    x, y, w, h = (float(max(low, v)) for low, v in zip((0, 0, 1, 1), box, strict=True))
    category = of["category_id"] if rng.random() < 0.85 else int(3 * rng.integers(3) + 1)
    detection: dict[str, Any] = {
        "image_id": of["image_id"],
        "category_id": category,
        "bbox": [x, y, w, h],
        "score": score,
    }
    if masks:
        mask = np.zeros((SIDE, SIDE), np.uint8, order="F")
        mask[int(y) : int(y + h) + 1, int(x) : int(x + w) + 1] = 1
        rle = coco_mask.encode(mask)
        detection["segmentation"] = {"size": [SIDE, SIDE], "counts": rle["counts"].decode()}
    return detection


def drawn_set(
    truth: dict[str, Any], found: list[dict[str, Any]], times: np.ndarray
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The data set in which the n-th image stands `times[n]` times, copies side by side."""
    copies = {
        image["id"]: [1000 * image["id"] + c for c in range(int(count))]
        for image, count in zip(truth["images"], times, strict=True)
    }

    def copied(entries: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
        return [{**entry, key: new} for entry in entries for new in copies[entry[key]]]

    annotations = copied(truth["annotations"], "image_id")
    sample = {
        "images": copied(truth["images"], "id"),
        "categories": truth["categories"],
        "annotations": [{**a, "id": number} for number, a in enumerate(annotations, start=1)],
    }
    return sample, copied(found, "image_id")
