"""Data sets in their native layouts: one file each, and `build_layout` to choose."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from segtrain.config.data import DataConfig, FolderConfig
from segtrain.data.datasets import ade20k, camvid, cityscapes, context, folder, lip, voc
from segtrain.data.datasets.layout import Layout, Sample
from segtrain.errors import UserError
from segtrain.wording import did_you_mean

__all__ = ["DATASETS", "Layout", "Sample", "build_layout", "named_layout"]

DATASETS: dict[str, Callable[[Path], Layout]] = {
    "cityscapes": cityscapes.layout,
    "ade20k": ade20k.layout,
    "context59": partial(context.layout, background=False),
    "context60": partial(context.layout, background=True),
    "voc": voc.layout,
    "lip": lip.layout,
    "camvid": camvid.layout,
}


def build_layout(config: DataConfig) -> Layout:
    """The data set of a configuration.

    Args:
        config: The section `data`.

    Returns:
        The layout; no image is opened.

    Raises:
        UserError: If a folder data set contradicts itself.
    """
    return named_layout(config.dataset, config.root, config.folder)


def named_layout(dataset: str, root: str | Path, options: FolderConfig | None = None) -> Layout:
    """A data set by name.

    Args:
        dataset: "folder" or a key of `DATASETS`.
        root: Folder of the data set.
        options: How to read a data set `folder`; None takes the defaults.

    Returns:
        The layout.

    Raises:
        UserError: If the name is unknown, or a folder data set contradicts itself.
    """
    root = Path(root).expanduser()
    if dataset == "folder":
        return folder.layout(root, options or FolderConfig())
    if dataset not in DATASETS:
        hint = did_you_mean(dataset, [*DATASETS, "folder"])
        raise UserError(f"no data set {dataset!r}" + f"; {hint}" * bool(hint))
    return DATASETS[dataset](root)
