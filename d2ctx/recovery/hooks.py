"""Saving as a hook of Detectron2's trainers: every process has a part in it."""

from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm

from d2ctx.errors import UserError
from d2ctx.recovery.checkpoints import FINAL
from d2ctx.recovery.rng import State, generator_state


class Checkpoints(HookBase):
    """Saves every so many iterations and after the last.

    Args:
        period: Iterations from one checkpoint to the next.

    Attributes:
        generators: Random generators of each process, as of the last save.
    """

    def __init__(self, period: int) -> None:
        self.period = period
        self.generators: list[State] = []
        self._saved = -1

    def after_step(self) -> None:
        """Save where it is due."""
        done = self.trainer.iter + 1
        if done % self.period == 0:
            self.save()
        if done >= self.trainer.max_iter:
            self.save_final()

    def save(self) -> None:
        """Save this iteration, once. All processes call it.

        Raises:
            UserError: In all processes, if the main one could not write.
        """
        if self._saved != self.trainer.iter:
            self._write(f"model_{self.trainer.iter:07d}")

    def save_final(self) -> None:
        """Save what the run ended with. All processes call it.

        Raises:
            UserError: In all processes, if the main one could not write.
        """
        self._write(FINAL)

    def _write(self, name: str) -> None:
        self.generators = comm.gather(generator_state())
        problem: Any = None
        if comm.is_main_process():
            try:
                self.trainer.journal.flush()
                self.trainer.checkpointer.save(name, iteration=self.trainer.iter)
            except UserError as error:
                problem = str(error)
        problem = comm.all_gather(problem)[0]
        if problem:
            raise UserError(problem)
        self._saved = self.trainer.iter
