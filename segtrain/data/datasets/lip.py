"""Look into Person (Gong et al., 2017): background and 19 parts, all 20 scored.

ROOT/{train,val}_images/*.jpg, ROOT/{train,val}_segmentations/*.png
"""

from pathlib import Path

from segtrain.data.datasets.layout import Layout, by_folders
from segtrain.data.labels import class_set, identity

NAMES = (
    "background hat hair glove sunglasses upper-clothes dress coat socks pants jumpsuits scarf "
    "skirt face left-arm right-arm left-leg right-leg left-shoe right-shoe"
).split()
# A mirrored person's left arm is a right arm.
FLIP_PAIRS = ((14, 15), (16, 17), (18, 19))


def layout(root: Path) -> Layout:
    """LIP.

    Args:
        root: Folder of train_images and train_segmentations.

    Returns:
        The layout; nothing is ignored on disk.
    """
    splits = ("train", "val")
    return Layout(
        name="lip",
        root=root,
        classes=class_set(NAMES),
        encoding=identity(len(NAMES), ignore=()),
        list_split=by_folders(
            images={s: f"{s}_images" for s in splits},
            labels={s: f"{s}_segmentations" for s in splits},
        ),
        splits=splits,
        flip_pairs=FLIP_PAIRS,
        one_to_one=True,
    )
