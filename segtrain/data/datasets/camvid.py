"""CamVid (Brostow et al., 2009), split and 11 classes of SegNet; value 11 is unlabelled.

ROOT/{train,val,test}.txt with lines "IMAGE LABEL"; the last two parts of each path lie below
ROOT, as in train/x.png trainannot/x.png. Without a list, all files of SPLIT and SPLITannot.
"""

from pathlib import Path, PurePosixPath

from segtrain.data.datasets.layout import Layout, Sample, by_folders, read_lines
from segtrain.data.labels import class_set, identity
from segtrain.errors import UserError

CLASSES = (
    ("sky", (128, 128, 128)),
    ("building", (128, 0, 0)),
    ("pole", (192, 192, 128)),
    ("road", (128, 64, 128)),
    ("pavement", (60, 40, 222)),
    ("tree", (128, 128, 0)),
    ("signsymbol", (192, 128, 128)),
    ("fence", (64, 64, 128)),
    ("car", (64, 0, 128)),
    ("pedestrian", (64, 64, 0)),
    ("bicyclist", (0, 128, 192)),
)
UNLABELLED = 11
SPLITS = ("train", "val", "test")


def layout(root: Path) -> Layout:
    """CamVid.

    Args:
        root: Folder of train, trainannot and the lists.

    Returns:
        The layout.
    """
    return Layout(
        name="camvid",
        root=root,
        classes=class_set([name for name, _ in CLASSES], [colour for _, colour in CLASSES]),
        encoding=identity(len(CLASSES), ignore=(UNLABELLED, 255)),
        list_split=list_split,
        splits=SPLITS,
    )


def list_split(root: Path, split: str) -> list[Sample]:
    """Images of a split, in the order of its list.

    Args:
        root: Folder of the data set.
        split: "train", "val" or "test".

    Returns:
        Samples.

    Raises:
        UserError: If a line of the list does not name two files.
    """
    path = root / f"{split}.txt"
    lines = read_lines(path)
    if not lines:
        folders = by_folders(images={s: s for s in SPLITS}, labels={s: f"{s}annot" for s in SPLITS})
        return folders(root, split)
    return [_sample(root, path, line) for line in lines]


def _sample(root: Path, path: Path, line: str) -> Sample:
    parts = line.split()
    if len(parts) != 2:
        raise UserError(f"{path}: expected 'IMAGE LABEL' on each line, got {line!r}")
    image, label = (Path(root, *PurePosixPath(part).parts[-2:]) for part in parts)
    return Sample(image=image, label=label, name=image.stem)
