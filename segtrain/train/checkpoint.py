"""Checkpoints of a run: whole files, the newest ones kept, weights beside them for use elsewhere.

`last.pt` holds all that training needs to go on, in one file, so that no crash can mix two states;
`last.safetensors` and `best.safetensors` hold the weights that are evaluated (the running average
where one is kept), with the configuration as text.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shutil import disk_usage
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile, ZipFile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from segtrain.errors import UserError
from segtrain.files import replacing, write_bytes
from segtrain.weights.grids import FIELD as GRIDS
from segtrain.weights.grids import grids_as_text

if TYPE_CHECKING:
    from segtrain.config.schema import RunConfig

FOLDER = "checkpoints"
VERSION = 1
_LAST, _BEST = "last", "best"
_NUMBERED = re.compile(r"step_(\d+)")
# Where weights came from changes no output of those that are saved.
_NO_SOURCE: Any = {"pretrained": True, "backbone": {"pretrained"}}


def save_checkpoint(
    folder: Path,
    state: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    text: Mapping[str, str],
    *,
    keep: int = 1,
) -> None:
    """Write the newest checkpoint; the ones before it keep their step as a name.

    Args:
        folder: Of the run.
        state: All that training needs, with its "step"; tensors and plain types.
        weights: What to use elsewhere.
        text: Fields of the weight file.
        keep: How many checkpoints there may be afterwards, at least 1.

    Raises:
        UserError: If it cannot be written; the one before is as it was.
    """
    place = folder / FOLDER
    place.mkdir(exist_ok=True)
    with _room_told(place, [state, weights]):
        with replacing(place / f"{_LAST}.pt") as partial:
            # Of an error in a file of Python the system's reason is known.
            with partial.open("wb") as file:
                torch.save({"version": VERSION, **state}, file)
            if keep > 1:
                _rename_last(place, step=state["step"])
        for old in _numbered(place)[keep - 1 :]:
            _remove(old)
        # The last thing that is written: where it is of this step, all of the checkpoint is there.
        save_weights(place / f"{_LAST}.safetensors", weights, text)


@contextmanager
def _room_told(place: Path, content: Any) -> Iterator[None]:
    """Add to the message of a disk that is full how much is needed and how much is free."""
    try:
        yield
    except UserError as error:
        needed, free = (n / 2**20 for n in (_bytes_of(content), disk_usage(place).free))
        raise UserError(
            f"{error} (a checkpoint takes {needed:.1f} MB, {free:.1f} MB are free there)"
        ) from error


def _bytes_of(content: Any) -> int:
    """Of all tensors in a nest."""
    if isinstance(content, Tensor):
        return content.numel() * content.element_size()
    if isinstance(content, Mapping):
        content = list(content.values())
    return sum(map(_bytes_of, content)) if isinstance(content, list | tuple) else 0


def save_best(folder: Path, weights: Mapping[str, Tensor], text: Mapping[str, str]) -> None:
    """Write the weights of the best evaluation so far.

    Args:
        folder: Of the run.
        weights: What was evaluated.
        text: Fields of the weight file.
    """
    place = folder / FOLDER
    place.mkdir(exist_ok=True)
    save_weights(place / f"{_BEST}.safetensors", weights, text)


def save_weights(path: Path, weights: Mapping[str, Tensor], text: Mapping[str, str]) -> None:
    """Write a weight file.

    Args:
        path: Ends in .safetensors.
        weights: By name.
        text: Fields.
    """
    # Views and channels-last layouts are no plain blocks of memory.
    plain = {name: value.detach().cpu().clone().contiguous() for name, value in weights.items()}
    # The library itself would make a file that nobody else may read.
    write_bytes(path, save(plain, metadata={"format": "pt", **text}))


def load_checkpoint(folder: Path, *, notes: list[str] | None = None) -> dict[str, Any]:
    """Read the newest checkpoint of a run that is not damaged, without running code from it.

    Args:
        folder: Of the run.
        notes: Gets a line for every damaged file that was passed over.

    Returns:
        What was saved, on the CPU.

    Raises:
        UserError: If there is none, or none can be read.
    """
    paths, damaged = checkpoints(folder), []
    for path in paths:
        try:
            state = read_checkpoint(path)
        except DamagedError as error:
            damaged.append(str(error))
            continue
        if notes is not None and damaged:
            text = f"going on from {path.name} of update {state['step']} instead"
            notes.append(f"{'; '.join(damaged)}; {text}")
        return state
    again = f"segtrain train --config {folder / 'config.yaml'} output=ANOTHER_FOLDER"
    if damaged:
        raise UserError(f"{'; '.join(damaged)}; there is no older one, start again: {again}")
    raise UserError(f"{folder} has no checkpoint to go on from; start again: {again}")


class DamagedError(UserError):
    """A checkpoint that is not what was once written."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, without running code from it.

    Args:
        path: The file.

    Returns:
        What was saved, on the CPU.

    Raises:
        DamagedError: If it cannot be read, or its check sums are wrong.
        UserError: If it is of another version of this program.
    """
    try:
        # Torch itself does not compare the check sums it writes.
        with ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise BadZipFile(f"wrong check sum of {broken}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever damaged bytes lead to
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise DamagedError(f"{path} cannot be read ({reason})") from error
    if not isinstance(state, dict) or "version" not in state:
        raise DamagedError(f"{path} cannot be read (it holds no state of a run)")
    if state["version"] != VERSION:
        raise UserError(
            f"{path} is of version {state['version']}, this program reads {VERSION}; "
            "go on with the program that wrote it"
        )
    return state


def checkpoints(folder: Path) -> list[Path]:
    """Find the checkpoints of a run.

    Args:
        folder: Of the run.

    Returns:
        Files, the newest first.
    """
    place = folder / FOLDER
    last = place / f"{_LAST}.pt"
    # A crash between renaming the last one and writing the next leaves numbered ones only.
    return [*([last] if last.is_file() else []), *_numbered(place)]


def newest_checkpoint(folder: Path) -> Path | None:
    """Find the newest checkpoint of a run.

    Args:
        folder: Of the run.

    Returns:
        The file, or None.
    """
    found = checkpoints(folder)
    return found[0] if found else None


def is_complete(folder: Path, step: int) -> bool:
    """Whether the weights beside the newest checkpoint are its own.

    Args:
        folder: Of the run.
        step: Of the checkpoint.

    Returns:
        False where the process ended between the two.
    """
    path = folder / FOLDER / f"{_LAST}.safetensors"
    if not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("step") == str(step)
    except (SafetensorError, OSError):  # damaged
        return False


def weight_text(model: nn.Module, config: "RunConfig", step: int) -> dict[str, str]:
    """Text fields that let a weight file be understood without its run.

    Args:
        model: Whose weights they are.
        config: Of the run.
        step: Updates done.

    Returns:
        The sections `model` and `data` of the configuration as far as they change an output, the
        grids of tables, and the step.
    """
    section = config.model.model_dump(mode="json", exclude_none=True, exclude=_NO_SOURCE)
    data = {"normalisation": getattr(model, "normalisation", config.data.normalisation)}
    text = {"config": json.dumps({"model": section, "data": data}), "step": str(step)}
    grid = getattr(getattr(model, "encoder", None), "grid", None)
    if grid is None:
        return {**text, GRIDS: grids_as_text(model)}
    return {**text, "grid": f"{grid[0]}x{grid[1]}"}


def _rename_last(place: Path, *, step: int) -> None:
    """Give the checkpoint so far, and its weights, the name of its step."""
    last = place / f"{_LAST}.pt"
    if not last.is_file():
        return
    before = step_of(last)
    if before in (None, step):  # a damaged one makes room for the next
        return
    # The weights first: a state whose weights are missing is saved again when the run goes on.
    weights = place / f"{_LAST}.safetensors"
    if weights.is_file():
        weights.replace(place / f"step_{before:08d}.safetensors")
    last.replace(place / f"step_{before:08d}.pt")


def step_of(path: Path) -> int | None:
    """Updates done before a checkpoint, without reading all of it.

    Args:
        path: The file.

    Returns:
        The number; None where it cannot be read.
    """
    try:
        return torch.load(path, map_location="meta", weights_only=True, mmap=True)["step"]
    except Exception:  # whatever damaged bytes lead to
        return None


def _numbered(place: Path) -> list[Path]:
    """States with a step as a name, newest first."""
    found = [p for p in place.glob("step_*.pt") if _NUMBERED.fullmatch(p.stem)]
    return sorted(found, reverse=True)


def _remove(state: Path) -> None:
    state.with_suffix(".safetensors").unlink(missing_ok=True)
    state.unlink()  # last: it is what is found again where the process ends before
