"""Checkpoints of a run: whole files, the newest ones kept, weights beside them for use elsewhere.

`last.pt` holds all that training needs to go on, in one file, so that no crash can mix two states;
`last.safetensors` and `best.safetensors` hold the weights that are evaluated (the running average
where one is kept), with the configuration as text.
"""

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
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
    """
    place = folder / FOLDER
    place.mkdir(exist_ok=True)
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


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Read the newest checkpoint of a run, without running code from it.

    Args:
        folder: Of the run.

    Returns:
        What was saved, on the CPU.

    Raises:
        UserError: If there is none, or it cannot be read.
    """
    path = newest_checkpoint(folder)
    if path is None:
        raise UserError(
            f"{folder} has no checkpoint to go on from; start again: segtrain train --config "
            f"{folder / 'config.yaml'} output=ANOTHER_FOLDER"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({str(error).splitlines()[0][:100]}); "
            "remove it to go on from an older one (train.keep)"
        ) from error
    if state.get("version") != VERSION:
        raise UserError(
            f"{path} is of version {state.get('version')}, this program reads {VERSION}; "
            "go on with the program that wrote it"
        )
    return state


def newest_checkpoint(folder: Path) -> Path | None:
    """Find the newest checkpoint of a run.

    Args:
        folder: Of the run.

    Returns:
        The file, or None.
    """
    place = folder / FOLDER
    last = place / f"{_LAST}.pt"
    # A crash between renaming the last one and writing the next leaves numbered ones only.
    found = [last] if last.is_file() else _numbered(place)
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
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("step") == str(step)


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
    before = torch.load(last, map_location="meta", weights_only=True, mmap=True)["step"]
    if before == step:
        return
    # The weights first: a state whose weights are missing is saved again when the run goes on.
    weights = place / f"{_LAST}.safetensors"
    if weights.is_file():
        weights.replace(place / f"step_{before:08d}.safetensors")
    last.replace(place / f"step_{before:08d}.pt")


def _numbered(place: Path) -> list[Path]:
    """States with a step as a name, newest first."""
    found = [p for p in place.glob("step_*.pt") if _NUMBERED.fullmatch(p.stem)]
    return sorted(found, reverse=True)


def _remove(state: Path) -> None:
    state.with_suffix(".safetensors").unlink(missing_ok=True)
    state.unlink()  # last: it is what is found again where the process ends before
