"""A small data set, a run folder with a tiny Segmenter, and Cityscapes of a few pixels."""

from pathlib import Path

import numpy as np
from PIL import Image

from segtrain.config.load import dump_yaml
from segtrain.config.schema import RunConfig
from segtrain.data.datasets.cityscapes import LABEL_IDS
from segtrain.train.checkpoint import save_best, weight_text
from tests.segtrain.toy_segmenter import built, randomized

NAMES = ("sky", "tree", "road")
SIZES = ((24, 36), (20, 20), (33, 17))


def write_folder(root: Path, *, count: int = 3, split: str = "val") -> Path:
    """A data set of three classes and void."""
    rng = np.random.default_rng(0)
    for place in ("images", "masks"):
        (root / place / split).mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(NAMES))
    for number in range(count):
        size = SIZES[number % len(SIZES)]
        image = rng.integers(0, 256, (*size, 3), np.uint8)
        mask = np.kron(rng.integers(0, 3, (4, 4)), np.ones((9, 9)))[: size[0], : size[1]]
        mask[:2, :5] = 255
        Image.fromarray(image).save(root / "images" / split / f"{number}.png")
        Image.fromarray(mask.astype(np.uint8)).save(root / "masks" / split / f"{number}.png")
    return root


def config_of(root: Path, *, dataset: str = "folder") -> RunConfig:
    return RunConfig.model_validate(
        {
            "data": {
                "dataset": dataset,
                "root": str(root),
                "crop": [16, 16],
                "base_size": [72, 18],
            },
            "model": {
                "name": "segmenter",
                "embed_dim": 8,
                "depth": 1,
                "num_heads": 2,
                "patch_size": 4,
                "decoder_layers": 1,
            },
            "optim": {"lr": 0.1},
            "train": {"iters": 1, "global_batch": 1},
        }
    )


def write_run(folder: Path, config: RunConfig, *, num_classes: int = 3, seed: int = 7) -> Path:
    """A run folder with the weights of a model that was never trained."""
    folder.mkdir(parents=True)
    fields = config.model.model_dump(exclude={"name"})
    model = randomized(built(fields, num_classes=num_classes, image_size=(16, 16)), seed)
    (folder / "config.yaml").write_text(dump_yaml(config))
    save_best(folder, model.state_dict(), weight_text(model, config, 1))
    return folder


def write_cityscapes(root: Path, *, split: str = "val", truth: bool = True) -> Path:
    """Two images with objects, void and licence plates' surroundings, in the official layout."""
    rng = np.random.default_rng(1)
    for number in range(2):
        key = f"toy_{number:06d}_000019"
        image = root / "leftImg8bit" / split / "toy" / f"{key}_leftImg8bit.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 64, 3), np.uint8)).save(image)
        labels = np.kron(rng.choice([*LABEL_IDS, 0, 4, 29], (4, 8)), np.ones((8, 8), int))
        instances = labels.copy()
        instances[labels >= 24] = labels[labels >= 24] * 1000 + number
        below = root / "gtFine" / split / "toy"
        below.mkdir(parents=True, exist_ok=True)
        if truth:
            Image.fromarray(labels.astype(np.uint8)).save(below / f"{key}_gtFine_labelIds.png")
            stored = Image.fromarray(instances.astype(np.uint16))
            stored.save(below / f"{key}_gtFine_instanceIds.png")
    return root
