"""Real samples that lie beside the checkout, and small data sets made on the spot."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.shared_data import SHARED

DATA = SHARED / "data"
needs_data = pytest.mark.skipif(
    not (DATA / "camvid").is_dir(), reason="the real samples are not shipped with the repository"
)


def save(path: Path, pixels, *, mode=None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8), mode).save(path, **options)
    return path


def folder_set(root: Path, masks, *, classes=("a", "b", "c"), suffix=".png") -> Path:
    """images/ and masks/ of both splits; each split gets all masks, with a shade of its own."""
    for number, split in enumerate(("train", "val")):
        for k, mask in enumerate(masks):
            mask = np.asarray(mask, np.uint8)
            image = np.full((*mask.shape[:2], 3), 40 * k + number, np.uint8)
            save(root / "images" / split / f"{k}.png", image)
            save(root / "masks" / split / f"{k}{suffix}", mask)
    if classes:
        (root / "classes.txt").write_text("\n".join(classes) + "\n")
    return root
