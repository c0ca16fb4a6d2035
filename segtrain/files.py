"""Files that are whole or not there, and the lock of a run folder."""

import errno
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
PARTIAL = ".partial"
_HOLDER_BYTES = 200
_LOCKED_BYTE = 1 << 30  # far behind the text, which others may then read on Windows as well
# What is wrong with a disk or a folder, and not with the program.
_PLACE_ERRORS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "EACCES", "EPERM", "ENOTDIR")
    if hasattr(errno, name)
}
# What a file system answers that knows no locks, such as some of clusters.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}
_held: set[BinaryIO] = set()


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

    Raises:
        UserError: If the disk is full, or the folder cannot be written to.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    with place_explained(path):
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


@contextmanager
def place_explained(path: Path) -> Iterator[None]:
    """Say in a line what keeps a file from being written.

    Args:
        path: The file.

    Yields:
        Nothing.

    Raises:
        UserError: If the disk is full, or the folder cannot be written to.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save hides what the system said behind an error of its own.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError) or cause.errno not in _PLACE_ERRORS:
            raise
        raise UserError(
            f"cannot write {path}: {cause.strerror}; make room there, or mend its rights or disk, "
            "and go on; what was written before is as it was"
        ) from error


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
    with place_explained(path):
        path.touch()
        file = path.open("rb+")
    with file:
        if not _try_to_lock(file):
            holder = file.read(_HOLDER_BYTES).decode(errors="replace").strip() or "unknown"
            raise UserError(
                f"{folder} is in use by {holder}; wait for it, end it, or choose another output"
            )
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            file.flush()
            _held.add(file)
            yield
        finally:
            _held.discard(file)
            with suppress(OSError):  # of a file system without locks
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
    except OSError as error:
        return error.errno in _NO_LOCKS  # nobody can hold it there
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


def _let_workers_go() -> None:
    """Close locks in a process just forked: a worker that outlives its trainer shall hold none."""
    for file in _held:
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_workers_go)
