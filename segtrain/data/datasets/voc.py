"""PASCAL VOC 2012 (Everingham et al.), 20 classes and background; palette PNGs, 255 is a border.

    ROOT/JPEGImages/*.jpg
    ROOT/SegmentationClass/*.png, ROOT/SegmentationClassAug/*.png
    ROOT/ImageSets/Segmentation/SPLIT.txt

A split is the name of a list. The augmented training set is any list with "aug" in its name, such
as trainaug; its labels come from SegmentationClassAug. Lines name an image ("2007_000032"), or two
files ("/JPEGImages/x.jpg /SegmentationClassAug/x.png").
"""

from pathlib import Path

from segtrain.data.datasets.layout import Layout, Sample, read_lines
from segtrain.data.labels import class_set, distinct_colours, identity
from segtrain.errors import UserError

NAMES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
    "motorbike person pottedplant sheep sofa train tvmonitor"
).split()


def layout(root: Path) -> Layout:
    """PASCAL VOC 2012.

    Args:
        root: The folder VOC2012.

    Returns:
        The layout.
    """
    return Layout(
        name="voc",
        root=root,
        classes=class_set(NAMES, distinct_colours(len(NAMES))),
        encoding=identity(len(NAMES)),
        list_split=list_split,
        splits=("train", "val", "trainval", "trainaug"),
    )


def list_split(root: Path, split: str) -> list[Sample]:
    """Images of a list.

    Args:
        root: The folder VOC2012.
        split: Name of a list below ImageSets/Segmentation, without ".txt".

    Returns:
        Samples in the order of the list.

    Raises:
        UserError: If the list is missing, or a line has more than two words.
    """
    path = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not path.is_file():
        hint = (
            "; the list of the augmented set (10582 images) and SegmentationClassAug are downloads "
            "of their own" * ("aug" in split)
        )
        raise UserError(f"no list {path} of split {split!r}{hint}")
    labels = "SegmentationClassAug" if "aug" in split else "SegmentationClass"
    return [_sample(root, path, line, labels) for line in read_lines(path)]


def _sample(root: Path, path: Path, line: str, labels: str) -> Sample:
    parts = line.split()
    if len(parts) > 2:
        raise UserError(f"{path}: expected an image or two files on each line, got {line!r}")
    if len(parts) == 2:
        image, label = (root / part.lstrip("/") for part in parts)
    else:
        image, label = root / "JPEGImages" / f"{line}.jpg", root / labels / f"{line}.png"
    return Sample(image=image, label=label, name=image.stem)
