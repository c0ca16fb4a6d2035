"""Black boxes: all that is needed to make an update again that went wrong, in one file.

`RUN/nonfinite/step_XXXXXXXX.pt` holds tensors and plain types only; the file of the same name that
ends in .json says what was found, for people and programs.
"""

import math
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segtrain.errors import UserError
from segtrain.files import replacing, write_json
from segtrain.train.feed import Batch

FOLDER = "nonfinite"
VERSION = 1
KEPT = 3  # so many a run that goes on writes; where it stops, one more
_TENSORS = ("counts", "generators", "model", "parts")
_NEEDED = (*_TENSORS, "config", "process", "processes", "step", "what")


def write_box(folder: Path, content: Mapping[str, Any], *, most: int | None) -> Path | None:
    """Write a black box.

    Args:
        folder: Of the run.
        content: With its "step", the number of the update from 1; tensors and plain types. The
            JSON file gets all but the tensors.
        most: How many there may be afterwards; None is any number.

    Returns:
        The file; None where there are enough, and none of them is of this update.
    """
    place = folder / FOLDER
    path = place / f"step_{content['step']:08d}.pt"
    others = set(place.glob("step_*.pt")) - {path}
    if most is not None and len(others) >= most:
        return None
    place.mkdir(exist_ok=True)
    with replacing(path) as partial:
        torch.save({"version": VERSION, **content}, partial)
    shown = {key: value for key, value in content.items() if key not in _TENSORS}
    write_json(path.with_suffix(".json"), _numbers_as_text(shown))
    return path


def read_box(path: Path) -> dict[str, Any]:
    """Read a black box, without running code from it.

    Args:
        path: The file.

    Returns:
        What was written, on the CPU.

    Raises:
        UserError: If it is none, or cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file; name one of RUN/{FOLDER}/step_XXXXXXXX.pt")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0][:100]})") from error
    if not isinstance(content, dict) or any(key not in content for key in _NEEDED):
        raise UserError(
            f"{path} is no black box; name one of RUN/{FOLDER}/step_XXXXXXXX.pt, which a run "
            "writes when a loss or a gradient is not finite"
        )
    if content.get("version") != VERSION:
        raise UserError(
            f"{path} is of version {content.get('version')}, this program reads {VERSION}; "
            "replay it with the program that wrote it"
        )
    return content


def plain_parts(parts: Sequence[Batch]) -> list[dict[str, Any]]:
    """Micro batches as they went into the model, on the CPU.

    Args:
        parts: From the loader.

    Returns:
        Their tensors, and the names of the images where they have them.
    """
    kept = []
    for part in parts:
        tensors = {k: v.detach().cpu().clone() for k, v in part.items() if isinstance(v, Tensor)}
        names = [str(name) for name in part.get("name", ())]
        kept.append({**tensors, "name": names})
    return kept


def _numbers_as_text(value: Any) -> Any:
    """The same with NaN and infinity as text, which JSON has no numbers for."""
    if isinstance(value, Mapping):
        return {key: _numbers_as_text(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_numbers_as_text(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
