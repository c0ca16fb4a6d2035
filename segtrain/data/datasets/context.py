"""PASCAL Context (Mottaghi et al., 2014): 59 classes, or 60 with the background.

    ROOT/JPEGImages/*.jpg
    ROOT/SegmentationClassContext/*.png                 0 background, 1..59
    ROOT/ImageSets/SegmentationContext/{train,val}.txt

ROOT is VOC2010; `segtrain data prepare context` makes labels and lists of the raw download. The
numbers follow the ascending ids of the raw 459 labels.
"""

from pathlib import Path

from segtrain.data.datasets.layout import Layout, Sample, read_lines
from segtrain.data.labels import class_set, distinct_colours, identity, reduce_zero
from segtrain.errors import UserError

LABELS, LISTS = "SegmentationClassContext", "ImageSets/SegmentationContext"
# Raw label of the 459 -> name, of the 59 frequent ones.
RAW_NAMES = {
    2: "aeroplane",
    9: "bag",
    18: "bed",
    19: "bedclothes",
    22: "bench",
    23: "bicycle",
    25: "bird",
    31: "boat",
    33: "book",
    34: "bottle",
    44: "building",
    45: "bus",
    46: "cabinet",
    59: "car",
    65: "cat",
    68: "ceiling",
    72: "chair",
    80: "cloth",
    85: "computer",
    98: "cow",
    104: "cup",
    105: "curtain",
    113: "dog",
    115: "door",
    144: "fence",
    158: "floor",
    159: "flower",
    162: "food",
    187: "grass",
    189: "ground",
    207: "horse",
    220: "keyboard",
    232: "light",
    258: "motorbike",
    259: "mountain",
    260: "mouse",
    284: "person",
    295: "plate",
    296: "platform",
    308: "pottedplant",
    324: "road",
    326: "rock",
    347: "sheep",
    349: "shelves",
    354: "sidewalk",
    355: "sign",
    360: "sky",
    366: "snow",
    368: "sofa",
    397: "table",
    415: "track",
    416: "train",
    420: "tree",
    424: "truck",
    427: "tvmonitor",
    440: "wall",
    445: "water",
    454: "window",
    458: "wood",
}
NAMES = ("background", *RAW_NAMES.values())


def layout(root: Path, *, background: bool) -> Layout:
    """PASCAL Context.

    Args:
        root: The folder VOC2010.
        background: True scores the background as class 0 (60 classes); False ignores it (59).

    Returns:
        The layout.
    """
    names, colours = NAMES, distinct_colours(len(NAMES))
    if not background:
        names, colours = names[1:], colours[1:]
    return Layout(
        name=f"context{len(names)}",
        root=root,
        classes=class_set(names, colours),
        encoding=(identity if background else reduce_zero)(len(names)),
        list_split=list_split,
        splits=("train", "val"),
    )


def list_split(root: Path, split: str) -> list[Sample]:
    """Images of a list.

    Args:
        root: The folder VOC2010.
        split: "train" or "val".

    Returns:
        Samples in the order of the list.

    Raises:
        UserError: If the list is missing.
    """
    path = root / LISTS / f"{split}.txt"
    if not path.is_file():
        raise UserError(
            f"no list {path}; make it with: segtrain data prepare context --root {root}"
        )
    return [
        Sample(root / "JPEGImages" / f"{name}.jpg", root / LABELS / f"{name}.png", name)
        for name in read_lines(path)
    ]
