"""What is kept of an update that was dropped: enough to do it again, and where it went wrong.

`nonfinite/step_NNNNNNNN.pt` in the run's folder holds the batch, the random generators, weights and
buffers before the update, and the largest number of every module; the `.json` beside it all but
the tensors. Both hold plain types only, which are read without running code.
"""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from detectron2.utils import comm

from ctxops.finite import FiniteWatch, nonfinite_parameters
from d2ctx.errors import UserError
from d2ctx.files import replacing, write_json
from d2ctx.recovery.batches import to_plain
from d2ctx.recovery.rng import generators_kept, set_generator_state
from d2ctx.recovery.updates import Failure, GuardedTrainer
from d2ctx.safe_read import read_checkpoint

logger = logging.getLogger(__name__)
FOLDER = "nonfinite"
BOXES = 5  # each as large as the model; later failures are only told
_VERSION = 1
Box = dict[str, Any]


def examine(trainer: GuardedTrainer, failure: Failure) -> Box:
    """Do a dropped update again with an eye on every module. All processes call it.

    Args:
        trainer: With the weights before the update.
        failure: What was dropped.

    Returns:
        "module", "kind" and "detail" of the first number that is not finite (None where all are),
        and "largest" |output| by module.
    """
    with generators_kept(), FiniteWatch(trainer.plain) as watch:
        set_generator_state(failure.before.generators)
        trainer.forward_backward(trainer.plain, failure.batch)
    trainer.undo(failure.before)
    first = None if watch.first is None else asdict(watch.first)
    return {"first": first, "largest": dict(watch.largest), "gradients": dict(watch.gradients)}


def write_box(
    folder: Path, trainer: GuardedTrainer, failure: Failure, found: Box, **more: Any
) -> Path | None:
    """Write what this process knows of a dropped update.

    Args:
        folder: Of the run.
        trainer: With the weights before the update.
        failure: What was dropped.
        found: By `examine`.
        more: Plain values to keep with it, at least "iteration".

    Returns:
        The file; None where the folder holds enough of them.

    Raises:
        UserError: If there is no room.
    """
    place = folder / FOLDER
    suffix = f"_rank{comm.get_rank()}" if comm.get_world_size() > 1 else ""
    path = place / f"step_{more['iteration']:08d}{suffix}.pt"
    if len(list(place.glob("*.pt"))) >= BOXES and not path.exists():
        return None
    told = {"version": _VERSION, "losses": failure.values, **found, **more}
    content = {
        **told,
        "generators": failure.before.generators,
        "batch": to_plain(failure.batch),
        "model": {name: value.cpu() for name, value in trainer.plain.state_dict().items()},
    }
    try:
        place.mkdir(exist_ok=True)
        with replacing(path) as partial:
            torch.save(content, partial)
        weights = nonfinite_parameters(trainer.plain)
        write_json(path.with_suffix(".json"), {**told, "nonfinite_parameters": weights})
    except (OSError, RuntimeError) as error:
        logger.warning("%s could not be written (%s)", path, error)
        return None
    return path


def read_box(path: Path) -> Box:
    """Read what `write_box` wrote.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        UserError: If it is no such file.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; name a step_*.pt under RUN/{FOLDER}")
    content = read_checkpoint(str(path))
    if content.get("version") != _VERSION or "batch" not in content:
        raise UserError(f"{path} is no record of a dropped update; name one under RUN/{FOLDER}")
    return content
