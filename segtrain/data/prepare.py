"""Label maps of training ids, made of the raw downloads of Cityscapes and PASCAL Context.

Whole files only: an interrupted run leaves nothing half written, and running it again goes on.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segtrain.data.datasets import cityscapes, context
from segtrain.data.datasets.layout import files_below, read_lines
from segtrain.data.reading import read_stored
from segtrain.errors import UserError
from segtrain.files import replacing, write_text
from segtrain.wording import first_of

Progress = Callable[[int, int], None]
NUM_RAW_LABELS = 459


def prepare_cityscapes(root: Path, *, progress: Progress | None = None) -> int:
    """Write `*_labelTrainIds.png` beside every `*_labelIds.png`, for programs that read those.

    `segtrain` itself reads the label ids.

    Args:
        root: Folder of gtFine, and gtCoarse where there is one.
        progress: Called with (done, total).

    Returns:
        Number of files written; what exists with the same pixels is left alone.

    Raises:
        UserError: If there are no label ids, or a file is damaged.
    """
    ends = (cityscapes.LABEL_IDS_END.lower(),)
    folders = sorted({root / name for name in cityscapes.TRUTH_FOLDERS.values()})
    sources = [path for folder in folders for path in files_below(folder, ends)]
    if not sources:
        raise UserError(f"no *{cityscapes.LABEL_IDS_END} below {root}/gtFine; name the download")
    encoding, written = cityscapes.label_ids_encoding(), 0
    for done, source in enumerate(sources, start=1):
        name = source.name[: -len(cityscapes.LABEL_IDS_END)] + cityscapes.TRAIN_IDS_END
        try:
            labels = encoding.decode(read_stored(source))
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
        written += _write_labels(source.with_name(name), labels)
        if progress is not None:
            progress(done, len(sources))
    return written


def prepare_context(root: Path, raw: Path, *, progress: Progress | None = None) -> int:
    """Write labels 0..59 and lists of PASCAL Context out of the 459 raw labels.

    Args:
        root: The folder VOC2010, with ImageSets/Main.
        raw: Folder of the download: labels.txt, and the .mat files in it or in "trainval".
        progress: Called with (done, total).

    Returns:
        Number of label maps written; what exists with the same pixels is left alone.

    Raises:
        UserError: If something is missing, damaged, or numbered in another way.
    """
    table = raw_table(raw / "labels.txt")
    sources = {path.stem: path for path in files_below(raw, (".mat",))}
    if not sources:
        raise UserError(f"no .mat files below {raw}; unpack trainval.tar.gz there")
    written = 0
    for done, (name, source) in enumerate(sources.items(), start=1):
        labels = table[_read_mat(source)]
        written += _write_labels(root / context.LABELS / f"{name}.png", labels)
        if progress is not None:
            progress(done, len(sources))
    for split in ("train", "val"):
        main = root / "ImageSets" / "Main" / f"{split}.txt"
        names = [line.split()[0] for line in read_lines(main)]
        if not names:
            raise UserError(f"no list {main}; it comes with VOC2010")
        listed = [name for name in names if name in sources]
        path = root / context.LISTS / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(f"{name}\n" for name in listed))
    return written


def raw_table(path: Path) -> NDArray[np.uint8]:
    """Raw label -> class 0..59, checked against the names of the download.

    Args:
        path: labels.txt with lines "ID: NAME".

    Returns:
        uint8 [460].

    Raises:
        UserError: If the file is missing, or gives one of the 59 ids another name.
    """
    lines = [line.partition(":") for line in read_lines(path)]
    names = {int(number): name.strip() for number, _, name in lines if number.strip().isdecimal()}
    if not names:
        raise UserError(f"no lines 'ID: NAME' in {path}; it comes with PASCAL Context")
    wrong = [
        f"{number} is {names.get(number)!r} instead of {name!r}"
        for number, name in context.RAW_NAMES.items()
        if names.get(number) != name
    ]
    if wrong:
        raise UserError(f"{path} numbers the labels in another way: {first_of(wrong)}")
    table = np.zeros(NUM_RAW_LABELS + 1, np.uint8)
    for k, number in enumerate(context.RAW_NAMES, start=1):
        table[number] = k
    return table


def _read_mat(path: Path) -> NDArray[np.int64]:
    """The array LabelMap of a MATLAB file."""
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError as error:
        raise UserError(
            "reading .mat files needs SciPy; install it with: pip install scipy"
        ) from error
    try:
        labels = np.asarray(loadmat(path)["LabelMap"]).astype(np.int64)
    except Exception as error:  # SciPy raises many kinds on damaged files
        raise UserError(f"cannot read LabelMap of {path}: {error}; copy it again") from error
    if labels.ndim != 2 or labels.min() < 0 or labels.max() > NUM_RAW_LABELS:
        raise UserError(f"{path}: expected labels 0..{NUM_RAW_LABELS} of two axes")
    return labels


def _write_labels(path: Path, labels: NDArray[np.uint8]) -> bool:
    if path.is_file() and np.array_equal(read_stored(path), labels):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as fresh:
        Image.fromarray(labels).save(fresh, format="PNG")
    return True
