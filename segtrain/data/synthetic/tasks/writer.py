"""Write the images of a task as a data set of folders, like the scenes of format `folder`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segtrain.data.synthetic.staging import REQUEST_FILE, holds, write_staged
from segtrain.data.synthetic.tasks.draw import TASKS, draw_task
from segtrain.data.synthetic.writers import SPLITS, check_num, check_val_fraction, split_of

GENERATOR_VERSION = 1  # raise whenever the same request gives other bytes
_KINDS = ("images", "masks")


def write_task(
    *,
    out: Path | str,
    task: str,
    num: int,
    seed: int = 0,
    side: int = 64,
    val_fraction: float = 0.25,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a data set, or do nothing when the directory already holds exactly this one.

    Args:
        out: directory of the data set; missing parents are made.
        task: a name of `TASKS`.
        num: number of images of both splits together, >= 1.
        seed: seed, >= 0.
        side: pixels, a multiple of 8 from 64 to 512.
        val_fraction: share of the validation split, 0 <= share < 1.
        overwrite: replace a different synthetic data set.
        progress: called with (done, total) after each image.

    Returns:
        Absolute path of the directory.

    Raises:
        ValueError: for a bad argument, for a directory that holds anything else, or when the
            directory cannot be written.
    """
    check_num(num)
    check_val_fraction(val_fraction)
    draw_task(task=task, seed=seed, index=0, side=side)  # refuses what cannot be drawn
    request = _request(task, num, seed, side, val_fraction)

    def fill(root: Path) -> None:
        _write_all(root, request, progress)

    return write_staged(out=out, request=request, overwrite=overwrite, fill=fill)


def holds_task(
    *, out: Path | str, task: str, num: int, seed: int, side: int, val_fraction: float
) -> bool:
    """Tell whether `out` already holds exactly this data set; arguments as in `write_task`."""
    return holds(out, _request(task, num, seed, side, val_fraction))


def _request(task: str, num: int, seed: int, side: int, val_fraction: float) -> dict[str, Any]:
    return {
        "generator": "segtrain data synth",
        "version": GENERATOR_VERSION,
        "task": task,
        "format": "folder",
        "num": num,
        "seed": seed,
        "side": side,  # scenes have a size: neither is ever taken for the other
        "val_fraction": float(val_fraction),
    }


def _write_all(
    root: Path, request: dict[str, Any], progress: Callable[[int, int], None] | None
) -> None:
    for kind in _KINDS:
        for split in SPLITS:
            (root / kind / split).mkdir(parents=True)
    about = {name: request[name] for name in ("task", "seed", "side")}
    for index in range(request["num"]):
        drawn = draw_task(index=index, **about)
        split = split_of(index=index, val_fraction=request["val_fraction"])
        for kind, array in zip(_KINDS, (drawn.image, drawn.semantic), strict=True):
            _save(array, root / kind / split / f"{index:06d}.png")
        if progress is not None:
            progress(index + 1, request["num"])
    names = "\n".join(TASKS[request["task"]].classes)
    (root / "classes.txt").write_text(names + "\n", encoding="utf-8")
    (root / REQUEST_FILE).write_text(json.dumps(request) + "\n", encoding="utf-8")


def _save(array: np.ndarray, path: Path) -> None:
    Image.fromarray(array).save(path, compress_level=3)
