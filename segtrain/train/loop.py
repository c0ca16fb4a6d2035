"""The training loop: one update after another, with evaluation, checkpoints and stopping between.

What makes an update the same however the global batch is split: its pixels are counted over all
processes and forward passes before the first of them, and every pass divides by that count.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segtrain import dist
from segtrain.config.schema import RunConfig
from segtrain.errors import Interrupted
from segtrain.files import write_json
from segtrain.optim import build_schedule
from segtrain.train.checkpoint import is_complete, save_best, save_checkpoint, weight_text
from segtrain.train.feed import Batch, Feed
from segtrain.train.folder import RESULTS_NAME, read_results
from segtrain.train.guard import GRADIENT_NORM, BrokenUpdate, Guard
from segtrain.train.journal import Journal
from segtrain.train.meter import Meter
from segtrain.train.passes import Passes, clip_gradients
from segtrain.train.progress import Progress, memory_mb
from segtrain.train.recovery import recover
from segtrain.train.rng import generators_kept
from segtrain.train.signals import StopRequest
from segtrain.train.state import TrainingState, micro_batch


class Run:
    """A run that can go on from any update.

    Args:
        config: Of the run.
        folder: Of the run; locked by the caller.
        state: Before the next update.
        feed: Data and evaluation.
        device: Of the model.
        journal: Of the run; None on processes other than the main one.
        progress: What the user sees.
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        folder: Path,
        state: TrainingState,
        feed: Feed,
        device: torch.device,
        journal: Journal | None,
        progress: Progress,
    ) -> None:
        options = config.train
        self.config, self.options, self.folder = config, options, folder
        self.state, self.feed, self.device = state, feed, device
        self.journal, self.progress = journal, progress
        self.micro = micro_batch(options)
        self.passes = options.global_batch // (self.micro * dist.world_size())
        self.work = Passes(config, device, micro=self.micro)
        self.guard = Guard(config, folder, state, self.work)
        self.schedule = build_schedule(
            config.schedule, base_lr=config.optim.lr, iters=options.iters
        )
        self.meter = Meter(device, images=options.global_batch)
        # A process that was killed may have left a checkpoint without its weights.
        self.saved = state.step if is_complete(folder, state.step) else None
        self.skipped = 0  # updates in a row that were left out
        self.batches: Iterator[Batch] | None = None
        self.results = read_results(folder)
        # Of a later update, where the newest checkpoints were removed.
        self.results["step"] = min(self.results["step"], state.step)

    def train(self, *, updates: int | None = None) -> dict[str, Any]:
        """Train to the end, or until a signal.

        Args:
            updates: How many to stop after, for a rehearsal; None goes to the end.

        Returns:
            Results of the last evaluation, see `evaluate`.

        Raises:
            Interrupted: After a signal, the state being saved.
            UserError: If a loss or a gradient is not finite, see `recover`.
        """
        state, end = self.state, self.options.iters
        if updates is not None:
            end = min(end, state.step + updates)
        with StopRequest() as stop, self.progress:
            if state.step:
                self.save()  # again, where the process before ended within it
            self.between_updates(stop)
            while state.step < end:
                rate = self.schedule.apply(state.optimizer, state.step)
                try:
                    self.advance(rate)
                except BrokenUpdate as broken:
                    recover(self, broken, rate=rate, rehearsing=updates is not None)
                self.between_updates(stop)
        return self.results

    def advance(self, rate: float) -> None:
        """Make the next update.

        Args:
            rate: Its learning rate, which is set already.

        Raises:
            BrokenUpdate: Instead of it.
        """
        dist.came_to(f"update {self.state.step + 1}")
        if self.batches is None:
            with generators_kept():
                self.batches = self.feed.batches(self.state.step, self.state.rewinds)
        values = self.update(list(islice(self.batches, self.passes)))
        self.state.step += 1
        self.skipped = 0
        self.report(values, rate)

    def between_updates(self, stop: StopRequest) -> None:
        """Do what is due: stop, save, evaluate.

        An evaluation comes after a checkpoint of the same update, so that it can be given up at
        any time: it is then the first thing that the resumed run does.

        Args:
            stop: Whether this process was asked to stop.
        """
        if dist.any_process(bool(stop)):
            self.save()
            self.write("stop", {"signal": stop.name})
            raise Interrupted(f"saved after update {self.state.step}; {self.how_to_go_on}")
        evaluating = self.is_due(self.options.eval_every) and self.results["step"] < self.state.step
        if evaluating or self.is_due(self.options.checkpoint_every):
            self.save()
        if evaluating:
            with stop.at_once(f"stopped while evaluating; {self.how_to_go_on}"):
                self.evaluate()

    def update(self, parts: Sequence[Batch]) -> dict[str, Tensor]:
        """Change the weights once.

        Args:
            parts: Micro batches of this process.

        Returns:
            Losses and the norm of the gradient, as `Meter.add` takes them.

        Raises:
            BrokenUpdate: If one of them is not finite; no weight is changed.
        """
        self.guard.remember()
        counts = self.work.counts(parts)
        values = self.work.gradients(self.state, parts, counts)
        values[GRADIENT_NORM] = clip_gradients(self.state, self.config.optim.clip_norm)
        if self.guard.is_broken(values):
            raise BrokenUpdate(parts, counts, values)
        self.step_optimizer()
        return values

    def step_optimizer(self) -> None:
        """Step, clear the gradients, and do what follows an update."""
        state = self.state
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        state.after_update()

    def report(self, values: Mapping[str, Tensor], rate: float) -> None:
        """Take in the numbers of an update, and every so often tell what they are.

        Args:
            values: Of the update just done; empty where it was skipped.
            rate: Its learning rate.
        """
        step = self.state.step
        self.meter.add(step, values)
        self.progress.step(step)
        if self.is_due(self.options.log_every):
            record = {**self.meter.read(), "lr": rate, "memory_mb": memory_mb(self.device)}
            self.write("train", {**record, **self.meter.take_updates()})
            self.progress.show(step, record)

    def evaluate(self) -> None:
        """Evaluate, and keep the weights where they are the best so far."""
        model, step = self.state.evaluated_model(), self.state.step
        with generators_kept(), self.meter.paused():
            scores = self.feed.evaluate(model.eval())
        self.state.model.train()
        best = self.results["best"]
        if best is None or _rank(scores["miou"]) > _rank(best["miou"]):
            best = {"step": step, "miou": scores["miou"]}
        self.results = {"step": step, "best": best, **scores}
        exported = self.export(model)
        self.write("evaluate", scores)
        if dist.is_main():
            if best["step"] == step:
                save_best(self.folder, *exported)
            # Last: an evaluation without results is done again, and its record forgotten.
            write_json(self.folder / RESULTS_NAME, self.results)
        self.progress.note(f"step {step}  mIoU {scores['miou']:.4f}  best {best['miou']:.4f}")

    def save(self) -> None:
        """Save the state, once per update."""
        if self.saved == self.state.step:
            return
        with self.meter.paused():
            content = {"config": self.config.model_dump(), **self.state.state_dict()}
            exported = self.export(self.state.evaluated_model())
            if dist.is_main():
                save_checkpoint(self.folder, content, *exported, keep=self.options.keep)
            dist.barrier()
        self.saved = self.state.step
        self.write("save", self.meter.take_updates())

    def export(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Weights of the model to use elsewhere, and the text fields of their file."""
        return model.state_dict(), weight_text(model, self.config, self.state.step)

    def is_due(self, every: int | None) -> bool:
        """Whether something is to be done now that is done every so many updates and at the end.

        Args:
            every: Updates from one time to the next; None is at the end only.

        Returns:
            The answer; never before the first update.
        """
        step = self.state.step
        return step == self.options.iters or bool(step and every and step % every == 0)

    def write(self, event: str, values: Mapping[str, Any]) -> None:
        """Write to the journal, on the main process.

        Args:
            event: What happened.
            values: More about it.
        """
        if self.journal is not None:
            self.journal.write(event, self.state.step, values)

    @property
    def how_to_go_on(self) -> str:
        """The command that continues the run."""
        return f"go on with: segtrain resume {self.folder}"


def _rank(miou: float | None) -> float:
    """A score as a number to compare; there is none where no pixel of the split is labelled."""
    return -1.0 if miou is None or math.isnan(miou) else miou
