"""A run of two updates in a folder of its own: the real loop, evaluation, checkpoint, results.

Differences from the run that is planned: it logs every update and evaluates one image, once.
"""

import io
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segtrain.config.schema import RunConfig
from segtrain.data.datasets import Layout, Sample
from segtrain.errors import UserError
from segtrain.evaluation.submission import submit_cityscapes
from segtrain.evaluation.trained import load_trained
from segtrain.plan.model import not_finite
from segtrain.train.folder import read_folder, start_folder
from segtrain.train.journal import NAME as JOURNAL_NAME
from segtrain.train.journal import Journal, read_journal
from segtrain.train.loop import Run
from segtrain.train.parts import build_parts, build_score
from segtrain.train.progress import Progress
from segtrain.train.rng import seed_generators
from segtrain.train.start import Parts, set_up, summary
from segtrain.train.state import batch_norm_notice, build_state, restore_generators
from segtrain.wording import first_of

UPDATES = 2
_FIX = "lower optim.lr, set optim.clip_norm or schedule.warmup_iters"


def rehearsed(config: RunConfig) -> RunConfig:
    """The configuration of the rehearsal: nothing is due within its updates but their records.

    Args:
        config: Of the run.

    Returns:
        One that gives the same updates, unless the run has fewer than three.
    """
    iters = max(config.train.iters, UPDATES + 1)
    rare = {"log_every": 1, "eval_every": None, "checkpoint_every": iters, "iters": iters}
    parallel = {"parallel": "ddp"}  # this is one process
    data = config.data.model_copy(update={"check": "off"})
    train = config.train.model_copy(update=rare | parallel)
    return config.model_copy(update={"data": data, "train": train})


def first_image(layout: Layout) -> Layout:
    """A data set whose splits have one image.

    Args:
        layout: A data set.

    Returns:
        The same with the first image of every split.
    """
    return replace(layout, list_split=_First(layout))


@dataclass(frozen=True)
class _First:
    layout: Layout

    def __call__(self, root: Path, split: str) -> list[Sample]:
        return self.layout.list_split(root, split)[:1]


class Flight:
    """A run in a folder that is removed later.

    Args:
        config: From `rehearsed`.
        layout: The data set.
        folder: Empty.
        device: Of the model.

    Raises:
        UserError: If anything cannot be built.
    """

    def __init__(
        self, config: RunConfig, layout: Layout, folder: Path, device: torch.device
    ) -> None:
        self.config, self.folder, self.device = config, folder, device
        self.layout = first_image(layout)
        set_up(config)
        self.parts: Parts = build_parts(config, device, False)
        state = build_state(self.parts.model, config, device)
        seed_generators(config.train.seed + 1)
        start_folder(folder, config, device=device)
        self.journal = Journal(folder, tensorboard=config.train.tensorboard)
        self.run = Run(
            config=config,
            folder=folder,
            state=state,
            feed=replace(self.parts.feed, evaluate=build_score(config, self.layout, device)),
            device=device,
            journal=self.journal,
            progress=Progress(total=UPDATES, stream=io.StringIO()),
        )

    def facts(self, planned: RunConfig) -> list[str]:
        """What follows from a configuration.

        Args:
            planned: Of the run that is rehearsed.

        Returns:
            Batch, epochs and learning rate, and what a user should know about batch norms.
        """
        notice = batch_norm_notice(self.run.state.model, planned, self.device)
        return [*summary(planned, self.parts, self.device), *([notice] if notice else [])]

    def close(self) -> None:
        """Close the files of the run."""
        self.journal.close()

    def train(self) -> list[dict[str, Any]]:
        """Make two updates.

        Returns:
            Their records in the journal.

        Raises:
            UserError: If a loss or a weight is not a finite number.
        """
        self.run.train(updates=UPDATES)
        if broken := not_finite(self.run.state.model):
            raise UserError(
                f"weights are not finite after {UPDATES} updates: {first_of(broken)}; {_FIX}"
            )
        records = read_journal(self.folder / JOURNAL_NAME)
        return [record for record in records if record["event"] == "train"]

    def evaluate(self) -> tuple[dict[str, Any], float]:
        """Evaluate the first image of the validation split.

        Returns:
            The scores, and the seconds it took.
        """
        begin = time.perf_counter()
        self.run.evaluate()
        return self.run.results, time.perf_counter() - begin

    def save_and_restore(self) -> float:
        """Save, restore into new objects, and compare everything; the weight file as well.

        Returns:
            Seconds of saving.

        Raises:
            UserError: Naming what is not the same.
        """
        run, begin = self.run, time.perf_counter()
        before = run.state.state_dict()
        run.saved = -1  # also where no update was made
        run.save()
        seconds = time.perf_counter() - begin
        config, saved = read_folder(self.folder)
        restored = build_state(build_parts(config, self.device, True).model, config, self.device)
        restored.load_state_dict(saved)
        restore_generators(saved)
        wrong = list(differences(before, restored.state_dict()))
        weights = load_trained(self.folder, weights="last", device=self.device)
        model = run.state.evaluated_model()
        wrong += differences(model.state_dict(), weights.model.state_dict(), "weights")
        if wrong:
            raise UserError(
                f"not the same after saving and restoring: {first_of(wrong)}; try "
                "output=FOLDER_ON_ANOTHER_DISK, and report it if that changes nothing"
            )
        return seconds

    def submit(self) -> list[str]:
        """Write the results of one image for the server of Cityscapes, and check them.

        Returns:
            What was found, a line each.

        Raises:
            UserError: If the server would refuse them.
        """
        trained = load_trained(self.folder, device=self.device)
        place = self.folder / "submission"
        result = submit_cityscapes(
            replace(trained, layout=self.layout), self.config.data.val_split, place
        )
        if result.violations:
            raise UserError("\n".join(result.violations))
        return result.text().replace(str(place), "submission").splitlines()


def differences(a: Any, b: Any, name: str = "") -> Iterator[str]:
    """Where two states differ.

    Args:
        a: Mappings, lists, tensors and plain values, nested.
        b: What should be the same, bit for bit.
        name: Of both.

    Yields:
        Names of what differs, with dots.
    """
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in {**a, **b}:
            inner = f"{name}.{key}" if name else str(key)
            yield from differences(a.get(key), b.get(key), inner)
    elif _listed(a) and _listed(b) and len(a) == len(b):
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, f"{name}.{number}")
    elif isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or not _equal(a.cpu(), b.cpu()):
            yield name
    elif type(a) is not type(b) or a != b:
        yield name


def _listed(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _equal(a: Tensor, b: Tensor) -> bool:
    """NaN is equal to NaN, so that a run that diverged has one reason."""
    if torch.equal(a, b) or a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    return bool(torch.isclose(a, b, rtol=0, atol=0, equal_nan=True).all())
