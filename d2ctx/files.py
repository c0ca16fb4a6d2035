"""Writing files whole or not at all, and the user's cache folder."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_PARTIAL = ".partial"


def user_cache() -> Path:
    """The folder that holds the caches of all programs of this user; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def write_text(path: Path, text: str) -> None:
    """Write so that an interruption leaves the old file or the new one, never half.

    Args:
        path: The file.
        text: Its new content.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write so that an interruption leaves the old file or the new one, never half.

    Args:
        path: The file.
        content: Its new content.
    """
    with replacing(path) as partial:
        partial.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Let the caller write a file beside `path`, then put it in its place.

    Args:
        path: The file; an error in the body leaves it as it was, and nothing beside it.

    Yields:
        The file to write.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}{_PARTIAL}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the new name outlast a loss of power; Windows does so by itself."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_partials(folder: Path) -> None:
    """Remove what processes that were killed left half written.

    Args:
        folder: Where no other process writes.
    """
    for path in folder.glob(f"*{_PARTIAL}"):
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, never half; numpy and tensor numbers become plain ones, NaN and infinity null.

    Args:
        path: The file.
        value: What to write.
    """
    write_text(path, json.dumps(_plain(value), indent=2, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str | bool | int) or value is None:
        return value
    return float(value) if math.isfinite(float(value)) else None
