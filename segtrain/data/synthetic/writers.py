"""Write synthetic data sets: COCO, COCO panoptic, or image and mask folders.

A data set is built in a hidden sibling of its directory and moved into place when complete. Each
file depends only on the request, so that neither workers nor repetition change a byte.
"""

import json
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from segtrain.data.synthetic import annotations as coco
from segtrain.data.synthetic.categories import CATEGORIES
from segtrain.data.synthetic.scene import Scene, check_size, generate_scene
from segtrain.data.synthetic.staging import REQUEST_FILE, holds, write_staged

FORMATS = ("coco", "coco-panoptic", "folder")
SPLITS = ("train", "val")
GENERATOR_VERSION = 1  # raise whenever the same request gives other bytes
MAX_NUM = 1_000_000
_PNG_LEVEL = 3  # the default level is 12 % smaller and takes twice the time


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What a worker needs to draw and save any one scene."""

    root: Path
    fmt: str
    seed: int
    size: tuple[int, int]
    val_fraction: float


@dataclass(frozen=True, kw_only=True)
class _Record:
    """What the annotation files need to know about one saved scene."""

    split: str
    image: coco.Json
    instances: list[coco.Json]
    panoptic: coco.Json | None


def split_of(*, index: int, val_fraction: float) -> str:
    """Tell the split of scene number `index`, spread evenly and independent of the total.

    Args:
        index: number of the scene, from 0.
        val_fraction: share of the validation split; 0.25 takes every fourth scene: 3, 7, 11, ...

    Returns:
        "train" or "val".
    """
    share = Fraction(val_fraction).limit_denominator(1000)
    return "val" if (index + 1) * share // 1 > index * share // 1 else "train"


def write_dataset(
    *,
    out: Path | str,
    fmt: str = "coco",
    num: int,
    seed: int = 0,
    size: tuple[int, int] = (256, 256),
    val_fraction: float = 0.25,
    workers: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a data set, or do nothing when the directory already holds exactly this one.

    Args:
        out: directory of the data set; missing parents are made.
        fmt: one of `FORMATS`.
        num: number of images of both splits together, >= 1.
        seed: seed, >= 0.
        size: width and height in pixels.
        val_fraction: share of the validation split, 0 <= share < 1.
        workers: processes that draw; 0 draws in this process. Files do not depend on it.
        overwrite: replace a different data set of this generator.
        progress: called with (done, total) after each image.

    Returns:
        Absolute path of the directory.

    Raises:
        ValueError: for a bad argument, for a directory that holds anything else, or when the
            directory cannot be written.
    """
    _check_request(fmt, num, seed, val_fraction, workers)
    check_size(size)
    request = _request(fmt, num, seed, size, val_fraction)

    def fill(root: Path) -> None:
        job = _Job(root=root, fmt=fmt, seed=seed, size=size, val_fraction=val_fraction)
        _write_all(job, num, workers, progress)
        _write_json(root / REQUEST_FILE, request)

    return write_staged(out=out, request=request, overwrite=overwrite, fill=fill)


def holds_request(
    *, out: Path | str, fmt: str, num: int, seed: int, size: tuple[int, int], val_fraction: float
) -> bool:
    """Tell whether `out` already holds exactly this data set; arguments as in `write_dataset`."""
    return holds(out, _request(fmt, num, seed, size, val_fraction))


def check_num(num: int) -> None:
    """Refuse a number of images; raises a ValueError outside 1..MAX_NUM."""
    if not 1 <= num <= MAX_NUM:
        raise ValueError(f"num must be 1..{MAX_NUM}, got {num}; use for example 200")


def check_val_fraction(share: float) -> None:
    """Refuse a share of the validation split; raises a ValueError outside [0, 1)."""
    if not 0.0 <= share < 1.0:
        raise ValueError(
            f"val-fraction must be at least 0 and below 1, got {share}; use for example 0.25"
        )


def _check_request(fmt: str, num: int, seed: int, val_fraction: float, workers: int) -> None:
    if fmt not in FORMATS:
        raise ValueError(f"unknown format {fmt!r}; use one of {', '.join(FORMATS)}")
    check_num(num)
    if seed < 0:
        raise ValueError(f"seed must be >= 0, got {seed}; use for example 0")
    check_val_fraction(val_fraction)
    if workers < 0:
        raise ValueError(f"workers must be >= 0, got {workers}; use 0 to draw in this process")


def _request(
    fmt: str, num: int, seed: int, size: tuple[int, int], val_fraction: float
) -> coco.Json:
    return {
        "generator": "segtrain data synth",
        "version": GENERATOR_VERSION,
        "format": fmt,
        "num": num,
        "seed": seed,
        "size": list(size),
        "val_fraction": float(val_fraction),
    }


def _write_all(
    job: _Job, num: int, workers: int, progress: Callable[[int, int], None] | None
) -> None:
    _make_folders(job)
    records = []
    with closing(_saved_scenes(job, num, workers)) as saved:
        for record in saved:
            records.append(record)
            if progress is not None:
                progress(len(records), num)
    if job.fmt == "folder":
        names = "\n".join(c.name for c in CATEGORIES)
        (job.root / "classes.txt").write_text(names + "\n", encoding="utf-8")
        return
    for split in SPLITS:
        _write_annotations(job, split, [r for r in records if r.split == split])


def _make_folders(job: _Job) -> None:
    if job.fmt == "folder":
        folders = [f"{kind}/{split}" for kind in ("images", "masks") for split in SPLITS]
    else:
        folders = ["images", "annotations"]
    if job.fmt == "coco-panoptic":
        folders += [f"annotations/panoptic_{split}" for split in SPLITS]
        folders += [f"semantic_{split}" for split in SPLITS]
    for folder in folders:
        (job.root / folder).mkdir(parents=True)


def _saved_scenes(job: _Job, num: int, workers: int) -> Iterator[_Record]:
    """Draw and save scenes 0..num-1, yield their records in order."""
    if workers == 0:
        for index in range(num):
            yield _save_scene(job, index)
        return
    # "spawn" is safe whatever threads the caller runs; chunks keep the pipes quiet
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        max_workers=min(workers, num),
        mp_context=context,
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),  # the parent alone answers an interrupt
    )
    try:
        yield from pool.map(_save_scene, [job] * num, range(num), chunksize=4)
    finally:
        pool.shutdown(cancel_futures=True)


def _save_scene(job: _Job, index: int) -> _Record:
    scene = generate_scene(seed=job.seed, index=index, size=job.size)
    split = split_of(index=index, val_fraction=job.val_fraction)
    name = f"{index:06d}.png"
    panoptic = None
    if job.fmt == "folder":
        _save_png(scene.image, job.root / "images" / split / name)
        _save_png(scene.semantic - 1, job.root / "masks" / split / name)
    else:
        _save_png(scene.image, job.root / "images" / name)
    if job.fmt == "coco-panoptic":
        panoptic = _save_panoptic(job, index, split, scene)
    return _Record(
        split=split,
        image=coco.image_entry(index=index, file_name=name, scene=scene),
        instances=coco.instance_entries(index=index, scene=scene) if job.fmt != "folder" else [],
        panoptic=panoptic,
    )


def _save_panoptic(job: _Job, index: int, split: str, scene: Scene) -> coco.Json:
    name = f"{index:06d}.png"
    segments = coco.panoptic_map(scene)
    folder = job.root / "annotations" / f"panoptic_{split}"
    _save_png(coco.segments_to_rgb(segments), folder / name)
    _save_png(scene.semantic, job.root / f"semantic_{split}" / name)
    return coco.panoptic_entry(index=index, file_name=name, segments=segments)


def _write_annotations(job: _Job, split: str, records: list[_Record]) -> None:
    folder = job.root / "annotations"
    images = [r.image for r in records]
    instances = [entry for r in records for entry in r.instances]
    document = coco.coco_document(
        images=images, annotations=instances, seed=job.seed, panoptic=False
    )
    _write_json(folder / f"instances_{split}.json", document)
    if job.fmt == "coco-panoptic":
        segments = [r.panoptic for r in records if r.panoptic is not None]
        document = coco.coco_document(
            images=images, annotations=segments, seed=job.seed, panoptic=True
        )
        _write_json(folder / f"panoptic_{split}.json", document)


def _save_png(array: np.ndarray, path: Path) -> None:
    Image.fromarray(array).save(path, compress_level=_PNG_LEVEL)


def _write_json(path: Path, document: coco.Json) -> None:
    path.write_text(json.dumps(document) + "\n", encoding="utf-8")
