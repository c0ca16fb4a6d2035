"""What to do about an update with a number that is not finite: `SOLVER.ON_NONFINITE`."""

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detectron2.utils import comm

from d2ctx.errors import UserError
from d2ctx.recovery.blackbox import examine, write_box
from d2ctx.recovery.updates import Failure
from d2ctx.wording import plural

if TYPE_CHECKING:
    from d2ctx.trainer import Trainer

logger = logging.getLogger(__name__)
POLICIES = ("stop", "skip", "rewind")
IN_A_ROW, REWINDS = 10, 3  # skips, and rewinds in all, before training stops


class Policy:
    """Stops, skips the update or goes back, as configured; every failure is recorded.

    Args:
        name: One of `POLICIES`.

    Raises:
        UserError: If it is another.
    """

    def __init__(self, name: str) -> None:
        if name not in POLICIES:
            raise UserError(
                f"SOLVER.ON_NONFINITE must be one of {', '.join(POLICIES)}, got {name!r}"
            )
        self.name, self._in_a_row = name, 0

    def passed(self) -> None:
        """An update was good."""
        self._in_a_row = 0

    def failed(self, trainer: "Trainer", failure: Failure) -> bool:
        """Deal with a dropped update. All processes call it.

        Args:
            trainer: Before the update.
            failure: What was dropped.

        Returns:
            Whether to go back to the last checkpoint.

        Raises:
            UserError: If training stops.
        """
        told = self._record(trainer, failure)
        self._in_a_row += 1
        stop = f"{told}; go on from the last checkpoint with the same command and --resume"
        if self.name == "stop":
            raise UserError(f"{stop}, to leave out such updates with SOLVER.ON_NONFINITE skip")
        if self.name == "skip":
            if self._in_a_row >= IN_A_ROW:
                raise UserError(
                    f"{plural(IN_A_ROW, 'update')} in a row were left out; {stop} and a lower "
                    "SOLVER.BASE_LR"
                )
            logger.warning("%s; the update is left out", told)
            return False
        if not trainer.checkpointer.has_checkpoint():
            raise UserError(
                f"{told}; there is no checkpoint to go back to: lower SOLVER.CHECKPOINT_PERIOD or "
                "SOLVER.BASE_LR and start again"
            )
        if trainer.rewinds >= REWINDS:
            raise UserError(
                f"training went back {REWINDS} times; {stop} and a lower SOLVER.BASE_LR"
            )
        logger.warning("%s; going back to the last checkpoint, on with other data", told)
        return True

    def _record(self, trainer: "Trainer", failure: Failure) -> str:
        """Keep the failure; what happened, in words, is the same in all processes."""
        found = examine(trainer.updates, failure)
        told, path = None, None
        if not failure.finite[comm.get_rank()]:
            told = _words(trainer.iter, failure, found["first"])
            path = write_box(
                Path(trainer.cfg.OUTPUT_DIR),
                trainer.updates,
                failure,
                found,
                iteration=trainer.iter,
                lr=trainer.learning_rates(),
                policy=self.name,
            )
        told, path = next(pair for pair in comm.all_gather((told, path)) if pair[0])
        return told if path is None else f"{told}; look with: python -m d2ctx.replay {path}"


def _words(iteration: int, failure: Failure, first: dict[str, Any] | None) -> str:
    broken = {k: v for k, v in failure.values.items() if not math.isfinite(v)}
    what = ", ".join(f"{name} {value}" for name, value in broken.items())
    where = "nowhere when done again" if first is None else f"{first['kind']} of {first['module']}"
    return f"iteration {iteration}: {what}; first in {where}"
