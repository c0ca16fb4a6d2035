"""The steps of `segtrain plan`, each tried even where one before it failed, if it can be."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import torch

from segtrain import dist
from segtrain.analyze import num_classes_of
from segtrain.config.load import load_config
from segtrain.config.schema import RunConfig
from segtrain.data.check import SplitReport, check_config
from segtrain.data.datasets import Layout, build_layout
from segtrain.errors import UserError
from segtrain.plan.flight import Flight, rehearsed
from segtrain.plan.forecast import (
    disk_free,
    disk_needed,
    expected_seconds,
    forecast_memory,
    gib,
)
from segtrain.plan.model import by_part, has_weights, try_weights, without_weights
from segtrain.plan.output import check_output, rehearsal_folder
from segtrain.plan.report import Report, Step
from segtrain.train.progress import counter, duration, memory_mb
from segtrain.wording import plural

_NEEDS_DATA = "needs the data set"
# What the splits that are checked are for, and their keys.
_USES = (("learnt", "data.train_split"), ("scored", "data.val_split"))


def rehearse(path: str | Path, overrides: Sequence[str], report: Report) -> None:
    """Try everything that a run does.

    Args:
        path: Configuration file.
        overrides: `key=value` over it.
        report: Gets the steps.

    Raises:
        UserError: If this is one of several processes.
        Interrupted: After a signal.
    """
    with dist.process_group() as device:
        if dist.world_size() > 1:
            raise UserError("plan rehearses in one process; start it without torchrun")
        config = report.run("configuration", lambda step: _configuration(step, path, overrides))
        if config is None:
            return
        home = report.run("output", lambda step: _output(step, config))
        with rehearsal_folder(home) as folder:
            _Rehearsal(config, device, report, folder).run()


def _configuration(step: Step, path: str | Path, overrides: Sequence[str]) -> RunConfig:
    config = load_config(path, overrides)
    step.lines.append(f"{path}: {config.model.name} on {config.data.dataset}")
    return config


def _output(step: Step, config: RunConfig) -> Path:
    folder = Path(config.output)
    home = check_output(folder)
    step.lines.append(f"{folder} is free, and can be written")
    return home


class _Rehearsal:
    """What follows once there is a configuration.

    Args:
        config: Of the run.
        device: This process's.
        report: Gets the steps.
        folder: For the rehearsal.
    """

    def __init__(
        self, config: RunConfig, device: torch.device, report: Report, folder: Path
    ) -> None:
        self.config, self.device, self.report, self.folder = config, device, report, folder
        self.start = rehearsed(config)  # changed where a step fails
        self.seconds: dict[str, float] = {}

    def run(self) -> None:
        """Try step after step."""
        report = self.report
        layout = report.run("data set", self._layout)
        if layout is None:
            report.skip("labels", _NEEDS_DATA)
        else:
            report.run("labels", self._labels)
        fits = self._fits(layout)
        if layout is not None and fits:
            self._fly(layout)
            return
        why = _NEEDS_DATA if layout is None else "would not fit into the memory"
        for name in ("batches", "training", "evaluation", "checkpoint"):
            report.skip(name, why)

    def _fits(self, layout: Layout | None) -> bool:
        """Try what needs the number of classes alone; whether training may be tried."""
        try:
            classes = len(layout.classes) if layout else num_classes_of(self.config)
        except UserError:  # it stands with the data only
            for name in ("memory", "weights"):
                self.report.skip(name, _NEEDS_DATA)
            return False
        fits = self.report.run("memory", lambda step: self._memory(step, classes))
        self.report.run("weights", lambda step: self._weights(step, classes))
        return fits is not False

    def _fly(self, layout: Layout) -> None:
        """The rehearsal itself."""
        report = self.report
        flight = report.run("batches", lambda step: self._flight(step, layout))
        if flight is None:
            for name in ("training", "evaluation", "checkpoint"):
                report.skip(name, "could not be built")
            return
        with closing(flight):
            report.run("training", lambda step: self._training(step, flight))
            report.run("evaluation", lambda step: self._evaluation(step, flight))
            report.run("checkpoint", lambda step: self._checkpoint(step, flight))
            if layout.name == "cityscapes":
                report.run("submission", lambda step: step.lines.extend(flight.submit()))
        if self.seconds.keys() == {"update", "image", "save"}:
            report.run("time", lambda step: self._time(step, layout))

    def _layout(self, step: Step) -> Layout:
        data = self.config.data
        layout = build_layout(data)
        counts = {split: len(layout.samples(split)) for split in (data.train_split, data.val_split)}
        said = ", ".join(f"{split} {plural(n, 'image')}" for split, n in counts.items())
        step.lines.append(f"{layout.name}, {plural(len(layout.classes), 'class')}: {said}")
        self.report.facts |= {"classes": len(layout.classes), "images": counts}
        return layout

    def _labels(self, step: Step) -> None:
        """The check that training makes; `off` is no answer to the question asked here."""
        data = self.config.data
        if data.check == "off":
            data = data.model_copy(update={"check": "full"})
        reports = check_config(data, progress=counter("checking the data"))
        files = sum(found.images for found in reports)
        step.lines.append(f"{plural(files, 'image')} with labels looked at ({data.check})")
        step.lines += [f"{found.split}: {note}" for found in reports for note in found.notes]
        if data.check == "full":
            for found, use in zip(reports, _USES, strict=True):
                step.problems += [] if sum(found.pixels) else [_nothing_in(found, *use)]

    def _memory(self, step: Step, num_classes: int) -> bool:
        memory = forecast_memory(self.start, num_classes, self.device)
        height, width = self.config.data.crop
        there = "" if memory.there is None else f" of {gib(memory.there)}"
        step.lines.append(
            f"forecast {gib(memory.peak)}{there} on {self.device.type}: {gib(memory.fixed)} of "
            f"weights, gradients and {self.config.optim.name}, {gib(memory.kept)} for "
            f"{plural(memory.images, 'crop')} of {height}x{width}"
        )
        self.report.facts["memory"] = asdict(memory) | {"peak": memory.peak}
        if problem := memory.problem(self.config.train):
            step.problems.append(problem)
        return not step.problems

    def _weights(self, step: Step, num_classes: int) -> None:
        try:
            lines, random = try_weights(self.config, num_classes)
        except Exception:
            self.start = without_weights(self.start)  # the rest is tried without them
            raise
        self.report.facts["not_loaded"] = random
        step.lines += lines
        if has_weights(self.config):
            step.lines.append(by_part(random) if random else "every parameter is loaded")

    def _flight(self, step: Step, layout: Layout) -> Flight:
        flight = Flight(self.start, layout, self.folder, self.device)
        if self.config.train.parallel == "fsdp":
            step.lines.append("train.parallel fsdp needs several processes: rehearsed with ddp")
        step.lines += flight.facts(self.config)
        self.report.facts |= {
            "global_batch": self.config.train.global_batch,
            "micro_batch": flight.run.micro,
            "passes": flight.run.passes,
            "lr": self.config.optim.lr,
        }
        return flight

    def _training(self, step: Step, flight: Flight) -> None:
        records = flight.train()
        last = records[-1]
        self.seconds["update"] = self.config.train.global_batch / last["images_per_second"]
        losses = ", ".join(f"{record['loss']:.4g}" for record in records)
        rates = ", ".join(f"{record['lr']:.3g}" for record in records)
        step.lines += [f"losses {losses}; learning rates {rates}"]
        peak = memory_mb(self.device)
        most = "" if peak is None else f", this process took {gib(peak * 2**20)} at most"
        step.lines += [f"{self.seconds['update']:.2f} s an update{most}"]

    def _evaluation(self, step: Step, flight: Flight) -> None:
        scores, self.seconds["image"] = flight.evaluate()
        miou = scores["miou"]
        said = "no labelled pixel" if miou is None or miou != miou else f"mIoU {miou:.4f}"
        step.lines.append(f"{said} on the first image, {self.seconds['image']:.2f} s")

    def _checkpoint(self, step: Step, flight: Flight) -> None:
        self.seconds["save"] = flight.save_and_restore()
        needed = disk_needed(self.folder, keep=self.config.train.keep)
        free = disk_free(self.folder)
        step.lines += ["saved, restored, the same bit for bit"]
        step.lines += [f"checkpoints take {gib(needed)}, the disk has {gib(free)} left"]
        self.report.facts["disk"] = {"needed": needed, "free": free}
        if needed > free:
            step.problems.append(
                f"checkpoints take {gib(needed)}, the disk has {gib(free)} left; make room, lower "
                "train.keep, or write output=FOLDER_ON_ANOTHER_DISK"
            )

    def _time(self, step: Step, layout: Layout) -> None:
        images = len(layout.samples(self.config.data.val_split))
        parts = expected_seconds(self.config.train, images=images, **self.seconds)
        self.report.facts["seconds"] = parts | {"total": sum(parts.values())}
        said = ", ".join(f"{name} {duration(value)}" for name, value in parts.items())
        total = duration(sum(parts.values()))
        step.lines.append(f"{total} (h:mm:ss) on this {self.device.type}: {said}")


def _nothing_in(found: SplitReport, use: str, key: str) -> str:
    return (
        f"data, {found.split}: no pixel has a class, nothing can be {use}; take another split "
        f"({key}) or mend the labels"
    )
