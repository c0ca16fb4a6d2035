"""Cityscapes (Cordts et al., 2016): 19 classes out of the label ids 0..33 and -1.

ROOT/leftImg8bit/SPLIT/CITY/*_leftImg8bit.png
ROOT/gtFine/SPLIT/CITY/*_gtFine_labelIds.png        train, val, test
ROOT/gtCoarse/train_extra/CITY/*_gtCoarse_labelIds.png
"""

from functools import partial
from pathlib import Path

from segtrain.data.datasets.layout import Layout, Sample, beside, files_below
from segtrain.data.labels import IGNORE_INDEX, ValueEncoding, class_set, from_mapping

# (name, label id, colour); the position is the train id.
CLASSES = (
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
)
LABEL_IDS = tuple(label_id for _, label_id, _ in CLASSES)
NUM_LABEL_IDS = 34
IMAGE_END, LABEL_IDS_END, TRAIN_IDS_END = "_leftImg8bit.png", "_labelIds.png", "_labelTrainIds.png"
TRUTH_FOLDERS = {"train": "gtFine", "val": "gtFine", "test": "gtFine", "train_extra": "gtCoarse"}


def label_ids_encoding() -> ValueEncoding:
    """Label ids 0..33 to train ids; the licence plate, -1, is 255 in eight bits.

    Returns:
        The encoding; everything but the 19 classes is ignored.
    """
    train_ids = {label_id: k for k, label_id in enumerate(LABEL_IDS)}
    table = {v: train_ids.get(v, IGNORE_INDEX) for v in range(NUM_LABEL_IDS)}
    return from_mapping(table)  # which adds 255


def layout(root: Path) -> Layout:
    """Cityscapes with the label ids of the download.

    Args:
        root: Folder of leftImg8bit and gtFine.

    Returns:
        The layout; split "train_extra" has coarse labels.
    """
    return Layout(
        name="cityscapes",
        root=root,
        classes=class_set([n for n, _, _ in CLASSES], [colour for _, _, colour in CLASSES]),
        encoding=label_ids_encoding(),
        list_split=list_split,
        splits=tuple(TRUTH_FOLDERS),
    )


def list_split(root: Path, split: str) -> list[Sample]:
    """Images of a split with their label ids.

    Args:
        root: Folder of leftImg8bit and gtFine.
        split: "train", "val", "test" or "train_extra".

    Returns:
        Samples; the labels of "test" hold no class.
    """
    truth = TRUTH_FOLDERS.get(split)
    if truth is None:
        return []
    below = root / "leftImg8bit" / split
    return beside(
        files_below(below, (IMAGE_END.lower(),)),
        below=below,
        labels=root / truth / split,
        rename=partial(_label_name, truth=truth),
    )


def _label_name(image: str, *, truth: str) -> str:
    return f"{image[: -len(IMAGE_END)]}_{truth}{LABEL_IDS_END}"
