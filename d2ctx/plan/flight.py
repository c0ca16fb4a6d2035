"""A run of two updates in a folder of its own: real trainer, evaluation, results, checkpoint."""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import Tensor

from d2ctx.errors import UserError
from d2ctx.evaluation import cityscapes, coco, panoptic
from d2ctx.evaluation.panoptic_files import read_json
from d2ctx.evaluation.violations import (
    cityscapes_violations,
    coco_violations,
    panoptic_violations,
)
from d2ctx.plan.one_image import OneImage, one_image_sets, truth_of
from d2ctx.recovery.checkpoints import FINAL
from d2ctx.trainer import Trainer
from d2ctx.wording import first_of

UPDATES = 2
_FIX = (
    "lower SOLVER.BASE_LR, raise SOLVER.WARMUP_ITERS or clip gradients "
    "(SOLVER.CLIP_GRADIENTS.ENABLED True)"
)


@dataclass
class Updates:
    """What was seen of each update.

    Attributes:
        losses: Sum of all losses.
        rates: Largest learning rate.
        seconds: Of data, passes and update.
    """

    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


class _Watched(Trainer):
    """The trainer of the run; tells of every update.

    Args:
        cfg: As of any trainer.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.seen = Updates()
        super().__init__(cfg)

    def run_step(self) -> None:
        """As any trainer, with a look at clock and loss."""
        self.seen.rates.append(max(group["lr"] for group in self.optimizer.param_groups))
        begin = time.perf_counter()
        super().run_step()
        self.seen.seconds.append(time.perf_counter() - begin)
        if self.updates.failure is None:
            self.seen.losses.append(self.storage.latest()["total_loss"][0])


class Flight:
    """A trainer whose output is removed later.

    Args:
        cfg: From `rehearsed`.

    Raises:
        UserError: If anything cannot be built, or the weights do not fit.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg, self.folder = cfg, Path(cfg.OUTPUT_DIR)
        self.trainer = _Watched(cfg)
        self.trainer.max_iter = min(UPDATES, cfg.SOLVER.MAX_ITER)
        self.trainer.resume_or_load(resume=False)

    @property
    def train_images(self) -> int | None:
        """Images that training draws from; None where the loader does not tell."""
        dataset = getattr(self.trainer.data_loader, "dataset", None)
        return len(dataset) if hasattr(dataset, "__len__") else None

    def train(self) -> Updates:
        """Make two updates.

        Returns:
            What was seen of them.

        Raises:
            UserError: If a loss or a weight is not a finite number.
        """
        trainer = self.trainer
        try:
            trainer.train()
        except UserError:
            if trainer.updates.failure is None:
                raise
            raise UserError(
                f"a loss or gradient of update {trainer.iter + 1} is not finite; {_FIX}"
            ) from None
        broken = [n for n, value in trainer.model.named_parameters() if not value.isfinite().all()]
        if broken:
            raise UserError(
                f"weights are not finite after {UPDATES} updates: {first_of(broken)}; {_FIX}"
            )
        return trainer.seen

    @contextmanager
    def test_sets(self, names: Sequence[str]) -> Iterator[tuple[CfgNode, list[OneImage]]]:
        """Test sets of one image, and the configuration that evaluates on them.

        Args:
            names: `DATASETS.TEST` of the run.

        Yields:
            Both.
        """
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0
        with one_image_sets(cfg, names, self.folder / "sets") as sets:
            cfg.DATASETS.TEST = tuple(one.name for one in sets)
            yield cfg, sets

    def evaluate(self, cfg: CfgNode) -> tuple[dict[str, Any], float]:
        """Evaluate with the evaluators of the run.

        Args:
            cfg: From `test_sets`.

        Returns:
            The scores, and the seconds that the model takes for one image.
        """
        model, name = self.trainer.model, cfg.DATASETS.TEST[0]
        results = Trainer.test(cfg, model)
        batch = next(iter(Trainer.build_test_loader(cfg, name)))
        was_training = model.training
        model.eval()
        begin = time.perf_counter()
        with torch.no_grad():
            model(batch)
        seconds = time.perf_counter() - begin
        model.train(was_training)
        return results, seconds

    def violations(self, cfg: CfgNode, one: OneImage) -> tuple[list[str], list[str]]:
        """Hold the result files of a test set against the rules of its server.

        Args:
            cfg: From `test_sets`.
            one: After `evaluate`.

        Returns:
            What was checked, and what is wrong, a line each.
        """
        folder = self.folder / "inference" / one.name
        kind, truth = truth_of(one.name)
        task = "both" if cfg.MODEL.MASK_ON else "bbox"
        checked, wrong = [], []
        instances, segments = folder / coco.RESULTS, folder / f"{panoptic.NAME}.json"
        frames = folder / cityscapes.NAME
        if instances.is_file() and not cfg.MODEL.KEYPOINT_ON:
            known = truth if kind == "coco" else _instances(one.name)
            checked.append(coco.RESULTS)
            wrong += coco_violations(read_json(instances), known, task=task)
        if segments.is_file():
            content = truth if kind == "panoptic" else _panoptic(one.name)
            checked.append(segments.name)
            wrong += panoptic_violations(read_json(segments), segments.with_suffix(""), content)
        if frames.is_dir():
            checked.append(frames.name)
            wrong += cityscapes_violations(frames, truth)
        return checked, wrong

    def save_and_restore(self) -> tuple[float, int]:
        """Save, restore into a new trainer, and compare everything.

        Returns:
            Seconds of saving, and bytes of a checkpoint.

        Raises:
            UserError: Naming what is not the same.
        """
        trainer, begin = self.trainer, time.perf_counter()
        trainer.iter = trainer.max_iter - 1  # the last that was done, as when training saves
        trainer.checkpointer.save(FINAL, iteration=trainer.iter)
        seconds = time.perf_counter() - begin
        again = _again(trainer)
        again.resume_or_load(resume=True)
        wrong = list(differences(trainer.model.state_dict(), again.model.state_dict()))
        wrong += differences(_state(trainer), _state(again), "trainer")
        if again.start_iter != trainer.max_iter:
            wrong.append("iteration")
        if wrong:
            raise UserError(
                f"not the same after saving and restoring: {first_of(wrong)}; try OUTPUT_DIR on "
                "another disk, and report it if that changes nothing"
            )
        return seconds, (self.folder / f"{FINAL}.pth").stat().st_size


def _again(trainer: Trainer) -> Trainer:
    """A new trainer for the same folder; data that were read are not read again."""

    class Again(Trainer):
        @classmethod
        def build_train_loader(cls, cfg: CfgNode) -> Any:
            return copy.copy(trainer.data_loader)

    return Again(trainer.cfg)


def _state(trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint holds besides the model, without what only a save draws."""
    state = trainer.state_dict()
    recovery = {k: v for k, v in state.get("recovery", {}).items() if k != "generators"}
    return {**state, "iteration": None, "recovery": recovery}


def _instances(name: str) -> Mapping[str, Any]:
    return read_json(Path(MetadataCatalog.get(name).json_file))


def _panoptic(name: str) -> Mapping[str, Any]:
    return read_json(Path(MetadataCatalog.get(name).panoptic_json))


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
