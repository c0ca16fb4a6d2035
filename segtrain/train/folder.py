"""The folder of a run: starting one, and going on with one under the same configuration."""

import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from segtrain import __version__
from segtrain.config.load import diff, dump_yaml, load_config
from segtrain.config.schema import RunConfig
from segtrain.errors import UserError
from segtrain.files import PARTIAL, write_text
from segtrain.train.checkpoint import FOLDER, load_checkpoint
from segtrain.train.journal import NAME as JOURNAL_NAME

CONFIG_NAME = "config.yaml"
ENVIRONMENT_NAME = "environment.txt"
RESULTS_NAME = "results.json"
# Keys that change no number of a run: they may differ when it goes on, perhaps elsewhere.
FREE = (
    "data.check",
    "data.root",
    "data.workers",
    "output",
    "train.checkpoint_every",
    "train.keep",
    "train.log_every",
    "train.on_nonfinite",
    "train.parallel",
    "train.timeout_minutes",
    "train.tensorboard",
)


def check_free(folder: Path) -> None:
    """Refuse to start in a folder that holds a run; one without any weights holds nothing.

    Args:
        folder: For a new run.

    Raises:
        UserError: Naming the two ways on.
    """
    if any(not path.name.endswith(PARTIAL) for path in (folder / FOLDER).glob("*")):
        raise UserError(
            f"{folder} already holds a run; go on with it: segtrain resume {folder}, or write "
            "output=ANOTHER_FOLDER"
        )


def remove_partial(folder: Path) -> None:
    """Remove what a process that was killed had not finished writing.

    Args:
        folder: Of a run; locked, so that nobody else writes what is looked for here.
    """
    names = (CONFIG_NAME, ENVIRONMENT_NAME, JOURNAL_NAME, RESULTS_NAME)
    patterns = (f"{FOLDER}/*{PARTIAL}", *(f"{name}.*{PARTIAL}" for name in names))
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        path.unlink()


def start_folder(folder: Path, config: RunConfig, *, device: torch.device) -> None:
    """Write what a new run starts with, once everything else is known to be in order.

    Args:
        folder: Exists, and is locked.
        config: Of the run.
        device: Of this process.
    """
    for name in (JOURNAL_NAME, RESULTS_NAME):  # of a run that died before its first checkpoint
        (folder / name).unlink(missing_ok=True)
    write_text(folder / CONFIG_NAME, dump_yaml(config))
    write_text(folder / ENVIRONMENT_NAME, environment(device))


def read_folder(
    folder: Path, *, notes: list[str] | None = None
) -> tuple[RunConfig, dict[str, Any]]:
    """Read what a run needs to go on.

    Args:
        folder: Of the run.
        notes: Gets a line where a checkpoint is damaged and an older one is taken.

    Returns:
        Its configuration and its newest checkpoint.

    Raises:
        UserError: If it is no run, has no checkpoint, or its configuration was changed.
    """
    config = read_config(folder)
    state = load_checkpoint(folder, notes=notes)
    check_unchanged(state["config"], config, folder / CONFIG_NAME)
    return config, state


def read_config(folder: Path) -> RunConfig:
    """Read the configuration of a run.

    Args:
        folder: Of the run.

    Returns:
        The configuration.

    Raises:
        UserError: If it is no run.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"{folder} is no run, it has no {CONFIG_NAME}; name the output of a run")
    return load_config(path)


def check_unchanged(before: dict[str, Any], now: RunConfig, path: Path) -> None:
    """Refuse to go on with settings that the steps so far were not made with.

    Args:
        before: Configuration of the checkpoint, dumped as plain types.
        now: Configuration to go on with.
        path: Where it is from.

    Raises:
        UserError: Listing what differs, if it changes numbers.
    """
    try:
        differences = diff(RunConfig.model_validate(before), now)
    except ValidationError as error:
        raise UserError(
            f"the checkpoint beside {path} was made by a version with other keys; go on with that "
            "version, or start a new run from the weights (init=...)"
        ) from error
    lines = [f"  {key}: {old} -> {new}" for key, old, new in differences if key not in FREE]
    if lines:
        raise UserError(
            f"{path} was changed since the checkpoint; put it back, or start a new run from the "
            "weights (init=...):\n" + "\n".join(lines)
        )


def read_results(folder: Path) -> dict[str, Any]:
    """Read the results of the last evaluation.

    Args:
        folder: Of the run.

    Returns:
        What `Run.evaluate` wrote; "step" 0 and "best" None where nothing was evaluated.
    """
    path = folder / RESULTS_NAME
    return json.loads(path.read_text()) if path.is_file() else {"step": 0, "best": None}


def environment(device: torch.device) -> str:
    """What a run was made with, for its folder.

    Args:
        device: Of this process.

    Returns:
        Some lines of text.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    lines = {
        "command": " ".join(sys.argv),
        "segtrain": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "device": f"{device} {name}".strip(),
        "threads": torch.get_num_threads(),
    }
    return "".join(f"{key}: {value}\n" for key, value in lines.items())


def environment_changes(folder: Path, device: torch.device) -> list[str]:
    """What is not as it was when a run started and may change its last bits.

    Args:
        folder: Of the run.
        device: Of this process.

    Returns:
        Lines "name: before -> now".
    """
    path = folder / ENVIRONMENT_NAME
    if not path.is_file():
        return []
    texts = (path.read_text(), environment(device))
    before, now = (dict(line.partition(": ")[::2] for line in t.splitlines()) for t in texts)
    keys = [key for key in now if key != "command" and before.get(key, now[key]) != now[key]]
    return [f"{key}: {before[key]} -> {now[key]}" for key in keys]
