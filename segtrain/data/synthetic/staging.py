"""The output directory: refuse foreign content, build beside it, move into place when complete."""

import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Request = dict[str, Any]
REQUEST_FILE = "synth.json"
_OWN_KEY = "generator"


def read_request(target: Path) -> Request | None:
    """Read which request a directory was written for.

    Args:
        target: a directory, or anything else.

    Returns:
        The request, None when there is none that can be read.
    """
    try:
        found = json.loads((target / REQUEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def needs_writing(*, target: Path, request: Request, overwrite: bool) -> bool:
    """Decide between writing, leaving as it is, and refusing.

    Args:
        target: the output directory.
        request: what is wanted.
        overwrite: replace another data set of the same generator.

    Returns:
        False when the directory holds exactly this request and `overwrite` is off.

    Raises:
        ValueError: when the directory holds anything else that must not be replaced.
    """
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; choose another directory")
    if not target.exists() or not any(target.iterdir()):
        return True
    found = read_request(target)
    if found is None or found.get(_OWN_KEY) != request[_OWN_KEY]:
        raise ValueError(
            f"{target} is not empty and holds no synthetic data set; choose another directory"
        )
    if overwrite or found == request:
        return overwrite
    changed = ", ".join(k for k in request if found.get(k) != request[k])
    raise ValueError(
        f"{target} holds another synthetic data set (different: {changed}); "
        "choose another directory or add --overwrite"
    )


def write_staged(
    *, out: Path | str, request: Request, overwrite: bool, fill: Callable[[Path], None]
) -> Path:
    """Write a data set whole, or do nothing when the directory already holds exactly this one.

    Args:
        out: directory of the data set; missing parents are made.
        request: what is wanted.
        overwrite: replace another data set of the same generator.
        fill: writes everything into a directory, the request too.

    Returns:
        Absolute path of the directory.

    Raises:
        ValueError: for a directory that holds anything else, or cannot be written.
    """
    target = Path(out).expanduser().resolve()
    try:
        if needs_writing(target=target, request=request, overwrite=overwrite):
            with staged(target) as root:
                fill(root)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"cannot write {target}: {reason}; choose another directory") from error
    return target


def holds(out: Path | str, request: Request) -> bool:
    """Tell whether a directory already holds exactly this data set.

    Args:
        out: the directory.
        request: what is wanted.

    Returns:
        The answer.
    """
    return read_request(Path(out).expanduser().resolve()) == request


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Give a hidden sibling to fill; move it to `target` on success, remove it on any failure.

    Args:
        target: the output directory; missing parents are made, an existing one is replaced.

    Yields:
        The directory to fill.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = target.parent / f".{target.name}.partial-{uuid.uuid4().hex[:8]}"
    stage.mkdir()
    try:
        yield stage
        _move_into_place(stage, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _move_into_place(stage: Path, target: Path) -> None:
    old = stage.with_name(stage.name.replace(".partial-", ".old-"))
    if target.exists():
        target.replace(old)
    try:
        stage.replace(target)
    except BaseException:
        if old.exists():
            old.replace(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
