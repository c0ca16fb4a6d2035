"""Files of what was found in every image, to compare two models on the same images.

One `.npz` per task beside the results: no pickle, and everything that `python -m d2ctx.compare` has
to check.
"""

import io
import json
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2ctx.errors import UserError
from d2ctx.files import write_bytes

VERSION = 1
_STEM = "per_image_"
_MOST_BYTES = 4 << 30  # a file that unpacks to more was not written here
_FIELDS = {"version": int, "kind": str, "dataset": str, "task": str, "classes": list}
# What zipfile and numpy raise on the way; encrypted archives and deep nesting are a RuntimeError.
_DAMAGED = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
Arrays = Mapping[str, NDArray[Any]]


def record_name(task: str) -> str:
    """Name of a task's file in the folder of a data set's results."""
    return f"{_STEM}{task}.npz"


def recorded_tasks(folder: Path) -> dict[str, Path]:
    """The files of a folder, by task."""
    return {p.stem.removeprefix(_STEM): p for p in sorted(folder.glob(f"{_STEM}*.npz"))}


def write_record(
    folder: Path,
    about: Mapping[str, Any],
    *,
    images: Sequence[str],
    digests: NDArray[np.uint32],
    arrays: Arrays,
) -> None:
    """Write the file of a task whole or not at all.

    Args:
        folder: Exists.
        about: "kind", "dataset", "task" and "classes", perhaps more.
        images: Ids.
        digests: [N], change with the ground truth of an image.
        arrays: The rest of the content, by name.
    """
    buffer = io.BytesIO()
    told = json.dumps({"version": VERSION, **about}, allow_nan=False)
    first = {"about": np.array(told), "images": np.array(images), "digests": digests}
    np.savez_compressed(buffer, **first, **arrays)
    write_bytes(folder / record_name(about["task"]), buffer.getvalue())


def read_about(path: Path) -> dict[str, Any]:
    """What a file says of itself; nothing in it is executed.

    Args:
        path: A file of `write_record`.

    Returns:
        Version, kind, data set, task, classes, perhaps more.

    Raises:
        UserError: If the file is missing, damaged or something else.
    """
    return _read(path, lambda stored: _about(stored))


def read_record(
    path: Path, *, kind: str, names: Iterable[str], check: Callable[[Any, Arrays], None]
) -> dict[str, Any]:
    """Read a file; nothing in it is executed, and everything is checked.

    Args:
        path: A file of `write_record`.
        kind: What it has to be.
        names: Of the arrays beside "images" and "digests".
        check: Raises a ValueError where what it gets, (about, arrays), contradicts itself.

    Returns:
        "about", "images" as a tuple of ids, "digests", and the arrays by name.

    Raises:
        UserError: If the file is missing, damaged or something else.
    """

    def load(stored: Any) -> dict[str, Any]:
        about = _about(stored)
        if about["kind"] != kind:
            raise ValueError(f"{about['kind']} instead of {kind}")
        arrays = {name: stored[name] for name in ("images", "digests", *names)}
        _check_images(arrays)
        check(about, arrays)
        return {"about": about, **arrays, "images": tuple(map(str, arrays["images"]))}

    return _read(path, load)


def _read(path: Path, load: Callable[[Any], Any]) -> Any:
    if not path.is_file():
        raise UserError(f"no file {path}; evaluate the run again, which writes it")
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(part.file_size for part in archive.infolist()) > _MOST_BYTES:
                raise ValueError("it unpacks to more than 4 GiB")
        with np.load(path, allow_pickle=False) as stored:
            return load(stored)
    except _DAMAGED as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} holds no records of images ({reason}); evaluate the run again, which writes it"
        ) from error


def _about(stored: Any) -> dict[str, Any]:
    about = json.loads(str(stored["about"]))
    if not isinstance(about, dict):
        raise ValueError("'about' is no mapping")
    for key, kind in _FIELDS.items():
        if not isinstance(about.get(key), kind):
            raise ValueError(f"'about' has no {key}")
    if not all(isinstance(name, str) for name in about["classes"]):
        raise ValueError("'about' has classes that are no text")
    if about["version"] != VERSION:
        raise ValueError(f"version {about['version']}, this program reads {VERSION}")
    return about


def _check_images(arrays: Arrays) -> None:
    images, digests = arrays["images"], arrays["digests"]
    if images.ndim != 1 or images.dtype.kind != "U" or not images.size:
        raise ValueError("'images' is no list of names")
    if digests.shape != images.shape or digests.dtype != np.uint32:
        raise ValueError("'digests' does not fit 'images'")


def check_array(
    arrays: Arrays, name: str, kind: type, *, rows: int | None, limits: Iterable[int] = ()
) -> None:
    """Check type, length and range of an array.

    Args:
        arrays: Among others this one.
        name: Its name.
        kind: Its dtype.
        rows: Its rows where it has two axes; None where it has one.
        limits: Of the first rows, or of the only one: all values lie in 0..limit - 1.

    Raises:
        ValueError: If it is otherwise.
    """
    array = arrays[name]
    wanted = 1 if rows is None else 2
    if array.dtype != kind or array.ndim != wanted or (rows is not None and len(array) != rows):
        raise ValueError(f"{name!r} is {array.dtype} {list(array.shape)}")
    if (array < 0).any() or not np.isfinite(array).all():
        raise ValueError(f"{name!r} is negative or not finite")
    for row, limit in zip(np.atleast_2d(array), limits, strict=False):
        if (row >= limit).any():
            raise ValueError(f"{name!r} names an image or a class that is not there")


def digest(value: Any) -> int:
    """A number that changes with the ground truth of an image.

    Args:
        value: Plain lists, mappings and values.

    Returns:
        32 bits.
    """
    return zlib.crc32(json.dumps(value, sort_keys=True, default=str).encode())
