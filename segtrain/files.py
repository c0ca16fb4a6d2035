"""Files that are whole or not there, and the lock of a run folder."""

import json
import math
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from segtrain.errors import UserError

LOCK_NAME = ".lock"
_HOLDER_BYTES = 200
_LOCKED_BYTE = 1 << 30  # far behind the text, which others may then read on Windows as well


def write_text(path: Path, text: str) -> None:
    """Write so that an interruption, or a loss of power, leaves the old file or the new one.

    Args:
        path: The file.
        text: Its new content, in UTF-8.
    """
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole; numbers of numpy and torch become plain ones, NaN and infinity null.

    Args:
        path: The file.
        value: What to write.
    """
    write_text(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def write_bytes(path: Path, content: bytes) -> None:
    """Write so that an interruption, or a loss of power, leaves the old file or the new one.

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
        path: The file; an error in the body leaves it as it was.

    Yields:
        The file to write.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(FileNotFoundError):
            partial.unlink()
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the new name last; Windows does so by itself."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def plain(value: Any) -> Any:
    """What JSON can say of a value; NaN and infinity are null, tuples lists.

    Args:
        value: Mappings, lists, tuples, text, numbers (also of numpy and torch), paths.

    Returns:
        Dicts, lists, text, numbers, true, false, null.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold a run folder, so that no second process writes into it.

    The system lets go of the lock when the process ends, however it ends.

    Args:
        folder: The folder of the run, which must exist.

    Yields:
        Nothing.

    Raises:
        UserError: If another process holds it, naming that process.
    """
    path = folder / LOCK_NAME
    path.touch()
    with path.open("rb+") as file:
        if not _try_to_lock(file):
            holder = file.read(_HOLDER_BYTES).decode(errors="replace").strip() or "unknown"
            raise UserError(
                f"{folder} is in use by {holder}; wait for it, end it, or choose another output"
            )
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            file.flush()
            yield
        finally:
            _unlock(file)


def _try_to_lock(file: BinaryIO) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(_LOCKED_BYTE)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        file.seek(0)
    return True


def _unlock(file: BinaryIO) -> None:
    """Let go at once: closing would not while a forked worker has the file open."""
    if os.name == "nt":
        import msvcrt

        file.seek(_LOCKED_BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
    else:
        import fcntl

        fcntl.flock(file.fileno(), fcntl.LOCK_UN)
