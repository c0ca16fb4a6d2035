"""`segtrain replay`: an update that was not finite made again from its black box, under a watch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ctxops.finite import FiniteWatch, NonFinite
from segtrain import dist
from segtrain.config.schema import RunConfig
from segtrain.errors import UserError
from segtrain.train.blackbox import read_box
from segtrain.train.folder import CONFIG_NAME, check_unchanged, read_config
from segtrain.train.guard import GRADIENT_NORM
from segtrain.train.passes import Passes, clip_gradients
from segtrain.train.rng import set_generator_state
from segtrain.train.start import Build, set_up
from segtrain.train.state import build_state
from segtrain.wording import first_of

_BEFORE, _AFTER = 4, 2  # modules shown around the first one


@dataclass(frozen=True)
class Seen:
    """The largest numbers of a module.

    Args:
        module: Its name.
        input: Largest |input|.
        output: Largest |output|.
        gradient: Largest |gradient| of its outputs; None where there was none.
    """

    module: str
    input: float
    output: float
    gradient: float | None


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What came of it.

    Args:
        step: Number of the update, from 1.
        what: "loss" or "gradient", as the run found it.
        process: Whose batch it is.
        processes: How many there were.
        before: Losses and norm of the gradient that the run saw.
        values: The same now.
        first: Where it starts; None where nothing is found.
        seen: Modules around it, in order of execution.
        images: Names or numbers of the images that are not finite themselves.
        devices: Where the run was, and where this is.
    """

    step: int
    what: str
    process: int
    processes: int
    before: Mapping[str, float]
    values: Mapping[str, float]
    first: NonFinite | None
    seen: list[Seen]
    images: list[str]
    devices: tuple[str, str]

    @property
    def reproduced(self) -> bool:
        """Whether anything was not finite this time."""
        return self.first is not None or not all(map(math.isfinite, self.values.values()))

    @property
    def _loss_is_finite(self) -> bool:
        return all(math.isfinite(v) for name, v in self.values.items() if name != GRADIENT_NORM)

    def text(self) -> str:
        """For people."""
        head = f"update {self.step}: the {self.what} was not finite"
        if self.processes > 1:
            head += f", batch of process {self.process} of {self.processes}"
        lines = [head, f"  then: {_numbers(self.before)}", f"  now:  {_numbers(self.values)}"]
        if not self.reproduced:
            there, here = self.devices
            lines.append(f"all is finite this time; the run was on {there}, this is {here}")
        elif self.first is None:
            lines.append("it starts outside the model's modules, or only without the watch")
        elif self.first.kind == "gradient" and not self._loss_is_finite:
            lines.append("all outputs of the model are finite: the loss makes it")
        else:
            lines.append(f"it starts in {self.first.module}: {self.first.kind}")
            lines.append(f"  {self.first.detail}")
        if self.images:
            lines.append(f"images that are not finite: {first_of(self.images)}")
        return "\n".join([*lines, *self._table()])

    def _table(self) -> list[str]:
        if not self.seen:
            return []
        width = max(len(row.module) for row in self.seen)
        lines = [f"  {'module':{width}}  {'|input|':>10}  {'|output|':>10}  {'|gradient|':>10}"]
        for row in self.seen:
            mark = ">" if self.first is not None and row.module == self.first.module else " "
            gradient = "" if row.gradient is None else f"{row.gradient:.4g}"
            lines.append(
                f"{mark} {row.module:{width}}  {row.input:10.4g}  {row.output:10.4g}  "
                f"{gradient:>10}".rstrip()
            )
        return lines

    def as_dict(self) -> dict[str, Any]:
        """For programs; NaN and infinity become null there."""
        return {**asdict(self), "reproduced": self.reproduced}


def replay(path: Path, *, build: Build) -> Replay:
    """Make an update again that was not finite.

    Args:
        path: The black box.
        build: As in `train`.

    Returns:
        What came of it.

    Raises:
        UserError: If the file is no black box, or does not fit its run.
    """
    box = read_box(path)
    config = _config(box, path)
    with dist.process_group() as device:
        if dist.world_size() > 1:
            raise UserError("replay makes the passes of one process; start it without torchrun")
        if config.train.precision == "fp16" and device.type != "cuda":
            config = _changed(config, precision="fp32")
        set_up(config)
        parts = build(config, device, True)
        state = build_state(parts.model, config, device)
        passes = Passes(config, device, micro=len(box["parts"][0]["image"]))
        counts = {name: value.to(device) for name, value in box["counts"].items()}

        def start() -> None:
            state.model.load_state_dict(box["model"])
            state.optimizer.zero_grad(set_to_none=True)
            set_generator_state(box["generators"])

        # Without a watch first: modules may have a faster way where nobody looks.
        start()
        values = passes.gradients(state, box["parts"], counts)
        values[GRADIENT_NORM] = clip_gradients(state, None)
        start()
        watch, _ = passes.looked_at(state.model, box["parts"], counts)
    return Replay(
        step=box["step"],
        what=box["what"],
        process=box["process"],
        processes=box["processes"],
        before=box["values"],
        values={name: value.item() for name, value in values.items()},
        first=watch.first,
        seen=_around(watch),
        images=_broken_images(box["parts"]),
        devices=(box["device"], str(device)),
    )


def _config(box: Mapping[str, Any], path: Path) -> RunConfig:
    """That of the run beside the file, where the data may have moved; else that of the box."""
    folder = path.absolute().parent.parent
    config = RunConfig.model_validate(box["config"])
    if (folder / CONFIG_NAME).is_file():
        now = read_config(folder)
        check_unchanged(box["config"], now, folder / CONFIG_NAME)
        config = now
    return _changed(config, parallel="ddp", compile=False)


def _changed(config: RunConfig, **options: Any) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update=options)})


def _around(watch: FiniteWatch) -> list[Seen]:
    """The module where it starts and its neighbours in order of execution."""
    names = list(watch.largest)
    if watch.first is None or watch.first.module not in names:
        return []
    at = names.index(watch.first.module)
    return [
        Seen(name, watch.inputs[name], watch.largest[name], watch.gradients.get(name))
        for name in names[max(0, at - _BEFORE) : at + _AFTER + 1]
    ]


def _broken_images(parts: list[dict[str, Any]]) -> list[str]:
    found = []
    for part in parts:
        finite = torch.isfinite(part["image"]).flatten(1).all(1).tolist()
        names = part["name"] or [f"image {k} of its batch" for k in range(len(finite))]
        found += [name for name, fine in zip(names, finite, strict=True) if not fine]
    return found


def _numbers(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())
