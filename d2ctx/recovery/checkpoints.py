"""Checkpoint files: written whole or not at all, found again, set aside where a run starts anew.

A crash at any moment leaves the checkpoints that were there: a new one is written beside its place,
flushed to the disk and renamed, and only then does `last_checkpoint` name it, in the same way.
"""

import logging
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from d2ctx.errors import UserError
from d2ctx.files import replacing, write_text
from d2ctx.recovery.journal import NAME as JOURNAL
from d2ctx.wording import plural

logger = logging.getLogger(__name__)
TAG = "last_checkpoint"  # Detectron2's file that names the newest checkpoint
FINAL = "model_final"
EARLIER = "earlier"
_NUMBERED = re.compile(r"model_(\d{7,})\.pth")
# What would be taken for the new run's.
_OF_A_RUN = (TAG, JOURNAL, "metrics.json", "results.json", "nonfinite")


def write_checkpoint(folder: Path, name: str, content: Mapping[str, Any]) -> None:
    """Write a checkpoint, then let `last_checkpoint` name it.

    Args:
        folder: Of the run.
        name: Of the file.
        content: Tensors and plain types.

    Raises:
        UserError: If there is no room or no permission; what was there is intact.
    """
    try:
        with replacing(folder / name) as partial, partial.open("wb") as file:
            torch.save(dict(content), file)
        write_text(folder / TAG, name)
    except (OSError, RuntimeError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise UserError(
            f"checkpoint {folder / name} could not be written ({reason}); the ones before it are "
            "intact: make room, then go on with the same command and --resume"
        ) from error


def _reason(error: BaseException | None) -> str | None:
    """What the system said; torch tells of a failed write in its own words."""
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(error):
            return "no space left, or no permission"
        error = error.__cause__ or error.__context__
    return None


def checkpoint_files(folder: Path) -> list[Path]:
    """Checkpoints of a run, newest first: the final one, then by iteration."""
    found = [p for p in folder.glob("model_*.pth") if _NUMBERED.fullmatch(p.name)]
    found.sort(key=lambda path: int(_NUMBERED.fullmatch(path.name)[1]), reverse=True)
    final = folder / f"{FINAL}.pth"
    return [final, *found] if final.is_file() else found


def to_resume_from(folder: Path) -> list[Path]:
    """Checkpoints that a run can go on from, best first.

    Args:
        folder: Of the run.

    Returns:
        The one that `last_checkpoint` names and those before it; without that file, all.
    """
    found = checkpoint_files(folder)
    try:
        named = folder / (folder / TAG).read_text().strip()
    except OSError:
        return found
    return [named, *found[found.index(named) + 1 :]] if named in found else [named]


def check_sums(path: Path) -> None:
    """Compare the sums that torch wrote with the content, which torch itself never does.

    Args:
        path: A file that torch can read.

    Raises:
        UserError: If they differ.
    """
    if not zipfile.is_zipfile(path):  # the format before PyTorch 1.6 has none
        return
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise UserError(f"{path} is damaged: the check sum of {broken} is wrong")


def set_aside(folder: Path) -> None:
    """Move an earlier run's checkpoints and records into a folder, when a run starts anew.

    Args:
        folder: Where the new run starts.
    """
    checkpoints = checkpoint_files(folder)
    if not checkpoints:
        return
    number = 1
    while (folder / EARLIER / str(number)).exists():
        number += 1
    place = folder / EARLIER / str(number)
    place.mkdir(parents=True)
    for path in (*(folder / name for name in _OF_A_RUN), *checkpoints):
        if path.exists():
            os.replace(path, place / path.name)
    logger.warning(
        "%s held an earlier run: its %s and records are now in %s (--resume continues a run)",
        folder,
        plural(len(checkpoints), "checkpoint"),
        place,
    )
