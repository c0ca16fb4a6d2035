"""The steps of the rehearsal, each tried even where one before it failed, if it can be."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.utils.env import seed_all_rng

from d2ctx.config import load_config
from d2ctx.errors import UserError
from d2ctx.plan.flight import Flight
from d2ctx.plan.forecast import (
    checkpoints,
    disk_free,
    duration,
    expected_seconds,
    forecast_memory,
    gib,
    peak_memory,
)
from d2ctx.plan.report import Report, Step
from d2ctx.plan.share import Share, rehearsed, share_of
from d2ctx.preflight import check_levels, examine_run
from d2ctx.recovery.checkpoints import checkpoint_files
from d2ctx.trainer import Trainer
from d2ctx.weights import load_initial_weights
from d2ctx.wording import plural

_AFTER_MEMORY = ("training", "evaluation", "results", "checkpoint")
Checked = tuple[list[str], list[str]]  # names of files, violations
_FIRST = "needs what is to be mended above"


def rehearse(
    path: str | Path, opts: Sequence[str], report: Report, *, num_gpus: int, num_machines: int
) -> None:
    """Try everything that a run does.

    Args:
        path: Configuration file.
        opts: KEY VALUE pairs over it.
        report: Gets the steps.
        num_gpus: GPUs of each machine, as in the run's command.
        num_machines: Machines.

    Raises:
        UserError: If there are no processes to plan for.
        Interrupted: After a signal.
    """
    if num_gpus < 1 or num_machines < 1:
        raise UserError(
            f"--num-gpus and --num-machines must be 1 or more, got {num_gpus} and {num_machines}"
        )
    cfg = report.run("configuration", lambda step: _configuration(step, path, opts))
    if cfg is None:
        return
    with TemporaryDirectory(prefix=".d2ctx-plan-", dir=_home(cfg)) as folder:
        _Rehearsal(cfg, report, Path(folder), num_gpus, num_machines).run()


def _configuration(step: Step, path: str | Path, opts: Sequence[str]) -> CfgNode:
    cfg = load_config(str(path), opts)
    step.lines.append(f"{path}: {cfg.MODEL.META_ARCHITECTURE}, {cfg.MODEL.BACKBONE.NAME}")
    return cfg


def _home(cfg: CfgNode) -> Path | None:
    """A folder on the disk of the run where one can be made; None is the system's place."""
    folder = Path(cfg.OUTPUT_DIR).absolute()
    home = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        TemporaryDirectory(dir=home).cleanup()
    except OSError:  # the checks tell of it
        return None
    return home


class _Rehearsal:
    """What follows once there is a configuration.

    Args:
        cfg: Of the run.
        report: Gets the steps.
        folder: For the rehearsal.
        num_gpus: GPUs of each machine.
        num_machines: Machines.
    """

    def __init__(
        self, cfg: CfgNode, report: Report, folder: Path, num_gpus: int, num_machines: int
    ) -> None:
        self.cfg, self.report, self.folder = cfg, report, folder
        self.gpus, self.machines = num_gpus, num_machines
        self.seconds: dict[str, float] = {}
        self.test_images = 0
        self.weights = cfg.MODEL.WEIGHTS  # left out after an error

    def run(self) -> None:
        """Try step after step."""
        report = self.report
        report.run("checks", self._checks)
        sound = report.go
        report.run("model", self._model)
        built = report.steps[-1].state == "ok"
        if not built or any("MODEL.WEIGHTS" in text for _, text in report.reasons()):
            report.skip("weights", _FIRST)
        else:
            report.run("weights", self._weights)
        if not (sound and built):
            for name in ("batch", "memory", *_AFTER_MEMORY):
                report.skip(name, _FIRST)
            return
        share = report.run("batch", self._batch)
        assert share is not None, "the checks let a batch pass that cannot be shared"
        if report.run("memory", lambda step: self._memory(step, share)) is False:
            for name in _AFTER_MEMORY:
                report.skip(name, "would not fit into the memory")
            return
        self._fly(share)

    def _fly(self, share: Share) -> None:
        """The rehearsal itself."""
        report = self.report
        cfg = rehearsed(share, output=str(self.folder), weights=self.weights)
        flight = report.run("training", lambda step: self._training(step, cfg, share))
        if flight is None:
            for name in _AFTER_MEMORY[1:]:
                report.skip(name, "needs a model after two updates")
            return
        self._evaluate(flight)
        report.run("checkpoint", lambda step: self._checkpoint(step, flight, share))
        if self.seconds.keys() == {"update", "image", "save"}:
            report.run("time", lambda step: self._time(step, share))

    def _checks(self, step: Step) -> None:
        """The check before every run; `off` is no answer to the question asked here."""
        cfg = self.cfg.clone()
        if cfg.DATASETS.CHECK == "off":
            cfg.defrost()
            cfg.DATASETS.CHECK = "full"
        lines, findings = examine_run(
            cfg, eval_only=False, num_gpus=self.gpus, num_machines=self.machines
        )
        step.lines += [*lines, *(f"note: {note}" for note in findings.notes)]
        if earlier := checkpoint_files(Path(cfg.OUTPUT_DIR)):
            step.lines.append(
                f"note: {cfg.OUTPUT_DIR} holds {plural(len(earlier), 'checkpoint')} of an earlier "
                "run; --resume goes on with it, a new run puts them aside"
            )
        step.problems += findings.errors

    def _model(self, step: Step) -> None:
        check_levels(self.cfg)
        model = Trainer.build_model(_on_cpu(self.cfg))
        parameters = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        step.lines.append(
            f"{parameters / 1e6:.3f} M parameters, {trained / 1e6:.3f} M of them trained"
        )
        self.report.facts |= {"parameters": parameters, "trained": trained}

    def _weights(self, step: Step) -> None:
        path, cfg = self.cfg.MODEL.WEIGHTS, self.cfg
        if not path:
            step.lines.append("MODEL.WEIGHTS is empty: all weights are random at first")
            return
        try:
            model = Trainer.build_model(_on_cpu(cfg))
            found = load_initial_weights(model, path, threshold=cfg.MODEL.WEIGHTS_MIN_MATCH)
        except Exception:
            self.weights = ""  # the rest is tried without them
            raise
        self.report.facts["not_loaded"] = [*found.missing, *found.wrong_shape]
        said = "every tensor is loaded" if found.complete else found.table()
        step.lines += [f"{path}: {found.model_fraction:.0%} of the parameters", *said.splitlines()]

    def _batch(self, step: Step) -> Share:
        share = share_of(self.cfg, self.gpus * self.machines)
        step.lines += share.lines()
        self.report.facts |= share.facts()
        return share

    def _memory(self, step: Step, share: Share) -> bool:
        cfg = share.cfg
        records = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        )
        model = Trainer.build_model(cfg)
        memory = forecast_memory(model, cfg, records, images=share.images)
        there = "" if memory.there is None else f" of {gib(memory.there)}"
        height, width = memory.size
        step.lines += [
            f"forecast {gib(memory.peak)}{there} in each process on {cfg.MODEL.DEVICE}: "
            f"{gib(memory.fixed)} of weights, gradients and {cfg.SOLVER.OPTIMIZER}, "
            f"{memory.images} x {gib(memory.kept)} for an image of {height}x{width}",
            "measured: what a forward pass of the largest image keeps; times the batch; libraries "
            "come on top",
        ]
        self.report.facts["memory"] = asdict(memory) | {"peak": memory.peak}
        if problem := memory.problem():
            step.problems.append(problem)
        return not step.problems

    def _training(self, step: Step, cfg: CfgNode, share: Share) -> Flight:
        seed_all_rng(None if cfg.SEED < 0 else cfg.SEED)  # as a run starts
        flight = Flight(cfg)
        seen = flight.train()
        self.seconds["update"] = seen.seconds[-1]
        losses = ", ".join(f"{loss:.4g}" for loss in seen.losses)
        rates = ", ".join(f"{rate:.3g}" for rate in seen.rates)
        step.lines.append(f"losses {losses}; learning rates {rates}")
        peak = peak_memory(torch.device(cfg.MODEL.DEVICE))
        most = "" if peak is None else f", this process took {gib(peak)} at most"
        step.lines.append(f"{self.seconds['update']:.2f} s an update{most}")
        if images := flight.train_images:
            solver = share.cfg.SOLVER
            epochs = solver.MAX_ITER * solver.IMS_PER_BATCH / images
            step.lines.append(f"{plural(images, 'image')}: {epochs:.2f} epochs")
            self.report.facts |= {"train_images": images, "epochs": epochs}
        return flight

    def _evaluate(self, flight: Flight) -> None:
        """The evaluators of all test sets, and their files."""
        report, names = self.report, self.cfg.DATASETS.TEST
        if not names:
            why = "DATASETS.TEST is empty: the run is never evaluated"
            for name in ("evaluation", "results"):
                report.skip(name, why)
            self.seconds["image"] = 0.0
            return
        checked = report.run("evaluation", lambda step: self._scores(step, flight, names))
        if checked is None:
            report.skip("results", "needs an evaluation")
        else:
            report.run("results", lambda step: self._results(step, checked))

    def _scores(self, step: Step, flight: Flight, names: Sequence[str]) -> list[Checked]:
        with flight.test_sets(names) as (cfg, sets):
            results, self.seconds["image"] = flight.evaluate(cfg)
            self.test_images = sum(one.images for one in sets)
            by_set = {sets[0].name: results} if len(sets) == 1 else results
            for found in by_set.values():
                step.lines += [_said(task, scores) for task, scores in found.items()]
            step.lines.append(
                f"on the first annotated image of {', '.join(names)}; "
                f"{self.seconds['image']:.2f} s an image"
            )
            return [flight.violations(cfg, one) for one in sets]

    def _results(self, step: Step, checked: list[Checked]) -> None:
        files = [name for names, _ in checked for name in names]
        step.lines.append(
            f"as a server takes them: {', '.join(files)}" if files else "no files for a server"
        )
        step.problems += [line for _, wrong in checked for line in wrong]

    def _checkpoint(self, step: Step, flight: Flight, share: Share) -> None:
        self.seconds["save"], size = flight.save_and_restore()
        count = checkpoints(share.cfg)
        needed, free = size * (count + 1), disk_free(self.folder)
        step.lines += ["saved, restored, the same bit for bit"]
        step.lines += [
            f"{plural(count, 'checkpoint')} of {gib(size)} and one that is being written take "
            f"{gib(needed)}, the disk has {gib(free)} left"
        ]
        self.report.facts["disk"] = {"needed": needed, "free": free, "checkpoints": count}
        if needed > free:
            step.problems.append(
                f"checkpoints take {gib(needed)}, the disk has {gib(free)} left; make room, raise "
                "SOLVER.CHECKPOINT_PERIOD, or set OUTPUT_DIR to a folder on another disk"
            )

    def _time(self, step: Step, share: Share) -> None:
        parts = expected_seconds(share.cfg, images=self.test_images, **self.seconds)
        self.report.facts["seconds"] = parts | {"total": sum(parts.values())}
        said = ", ".join(f"{name} {duration(value)}" for name, value in parts.items())
        step.lines.append(
            f"{duration(sum(parts.values()))} (h:mm:ss) at the speed of this process: {said}"
        )


def _on_cpu(cfg: CfgNode) -> CfgNode:
    """The same model where nothing is computed, also without the device of the run."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def _said(task: str, scores: object) -> str:
    """The first score of a task."""
    if not isinstance(scores, dict) or not scores:
        return f"{task}: no score"
    name, value = next(iter(scores.items()))
    return f"{task} {name} " + ("does not exist" if value != value else f"{value:.2f}")
