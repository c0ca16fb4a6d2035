"""A data set of one's own: images and masks of equal names.

ROOT/images/SPLIT/**, ROOT/masks/SPLIT/**           one folder per split, or
ROOT/images/**, ROOT/masks/**, ROOT/SPLIT.txt       a list of names per split
ROOT/classes.txt                                    one class name per line
"""

from functools import partial
from pathlib import Path

from segtrain.config.data import FolderConfig
from segtrain.data.datasets.layout import (
    IMAGE_SUFFIXES,
    Layout,
    Sample,
    files_below,
    read_lines,
)
from segtrain.data.labels import (
    IGNORE_INDEX,
    ColourEncoding,
    Encoding,
    class_set,
    from_mapping,
    identity,
    reduce_zero,
)
from segtrain.errors import UserError
from segtrain.wording import did_you_mean, first_of

VOID = "ignore"  # the palette's name for a colour that counts for nothing


def layout(root: Path, config: FolderConfig) -> Layout:
    """A folder data set.

    Args:
        root: Folder of images and masks.
        config: How the masks are to be read.

    Returns:
        The layout.

    Raises:
        UserError: If the classes are missing or contradict mapping, palette or binary.
    """
    names = class_names(root, config)
    encoding = build_encoding(names, config)
    colours = [config.palette[name] for name in names] if config.palette else None
    return Layout(
        name="folder",
        root=root,
        classes=class_set(names, colours),
        encoding=encoding,
        list_split=partial(list_split, images=config.images, masks=config.masks),
        splits=_splits(root, config.images),
        # A list may well leave masks out.
        one_to_one=not _lists(root, config.images),
    )


def class_names(root: Path, config: FolderConfig) -> tuple[str, ...]:
    """The names of the classes: as listed, of a file, or of the palette.

    Args:
        root: Folder of the data set.
        config: What the configuration says.

    Returns:
        Names in the order of the class numbers.

    Raises:
        UserError: If there is no list, or an empty one.
    """
    if isinstance(config.classes, tuple):
        names: tuple[str, ...] = config.classes
    elif config.classes is None and config.palette:
        names = tuple(name for name in config.palette if name != VOID)
    else:
        path = root / (config.classes or "classes.txt")
        names = tuple(read_lines(path))
        if not names and config.binary:
            names = ("background", "foreground")
        elif not names:
            fix = "write one class name a line there, or data.folder.classes: [NAME, ...]"
            raise UserError(f"no class names in {path}; {fix}")
    if config.binary and len(names) != 2:
        raise UserError(f"data.folder.binary has 2 classes, got {len(names)} names; name two")
    return names


def build_encoding(names: tuple[str, ...], config: FolderConfig) -> Encoding:
    """How the masks are read: numbers, 0/255, a mapping, or colours.

    Args:
        names: Names of the classes.
        config: What the configuration says.

    Returns:
        The encoding.

    Raises:
        UserError: If mapping or palette name classes that do not exist.
    """
    if config.palette is not None:
        return _colours(names, config.palette)
    if config.binary:
        # 255 is the foreground here, so that it cannot mean ignored; grey in between is an error.
        ignore = tuple(v for v in config.ignore if v != 255)
        return from_mapping({0: 0, 1: 1, 255: 1}, ignore=ignore)
    if config.mapping is not None:
        wrong = [c for c in config.mapping.values() if c >= len(names) and c != IGNORE_INDEX]
        if wrong:
            raise UserError(
                f"data.folder.mapping: no class {first_of(wrong)}, {len(names)} classes are named; "
                f"use 0..{len(names) - 1}, or 255 to ignore"
            )
        return from_mapping(config.mapping, ignore=config.ignore)
    return (reduce_zero if config.reduce_zero else identity)(len(names), ignore=config.ignore)


def list_split(root: Path, split: str, *, images: str, masks: str) -> list[Sample]:
    """Images of a split with the masks of their names.

    Args:
        root: Folder of the data set.
        split: Name of a folder below images and masks, or of a list "SPLIT.txt" below the root.
        images: Folder of images below the root.
        masks: Folder of masks below the root.

    Returns:
        Samples in the order of the list, or of their names; a mask that is missing is named as
        the PNG that was expected.

    Raises:
        UserError: If two images or masks have one name, or the list names unknown images.
    """
    listed = read_lines(root / f"{split}.txt")
    if (root / images / split).is_dir():
        images_root, masks_root, listed = root / images / split, root / masks / split, []
    elif listed:
        images_root, masks_root = root / images, root / masks
    else:
        return []
    found, labels = _by_stem(images_root), _by_stem(masks_root)
    unknown = [n for n in listed if _stem(n) not in found]
    if unknown:
        raise UserError(f"{root / split}.txt names no image of {images_root}: {first_of(unknown)}")
    names = [_stem(n) for n in listed] or list(found)
    return [Sample(found[n], labels.get(n, masks_root / f"{n}.png"), n) for n in names]


def _by_stem(folder: Path) -> dict[str, Path]:
    """Name without ending -> file."""
    table: dict[str, Path] = {}
    for path in files_below(folder, IMAGE_SUFFIXES):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in table:
            raise UserError(f"{folder} has two files of one name: {table[name].name}, {path.name}")
        table[name] = path
    return table


def _stem(name: str) -> str:
    """A listed name without the ending of an image; other dots belong to the name."""
    return name.rpartition(".")[0] if name.lower().endswith(IMAGE_SUFFIXES) else name


def _splits(root: Path, images: str) -> tuple[str, ...]:
    folders = [p.name for p in (root / images).glob("*") if p.is_dir()]
    return tuple(sorted({*folders, *_lists(root, images)}))


def _lists(root: Path, images: str) -> list[str]:
    """Splits that are text files which begin with the name of an image."""
    return [path.stem for path in root.glob("*.txt") if _names_an_image(path, root / images)]


def _names_an_image(path: Path, images: Path) -> bool:
    try:
        first = _stem(read_lines(path)[0])
    except (UserError, IndexError):
        return False  # somebody's notes
    return any((images / f"{first}{suffix}").is_file() for suffix in IMAGE_SUFFIXES)


def _colours(names: tuple[str, ...], palette: dict[str, tuple[int, int, int]]) -> ColourEncoding:
    numbers = {name: k for k, name in enumerate(names)} | {VOID: IGNORE_INDEX}
    for name in palette:
        if name not in numbers:
            hint = did_you_mean(name, names)
            raise UserError(f"data.folder.palette: no class {name!r}" + f"; {hint}" * bool(hint))
    missing = [name for name in names if name not in palette]
    if missing:
        raise UserError(f"data.folder.palette has no colour for {first_of(missing)}; add them")
    if len(set(palette.values())) < len(palette):
        raise UserError("data.folder.palette: two names have one colour; give each its own")
    return ColourEncoding(tuple((colour, numbers[name]) for name, colour in palette.items()))
