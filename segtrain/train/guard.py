"""Updates whose loss or gradient is not finite: noticed before they change anything, explained.

The weights are only touched after the check; what forward passes change (statistics of norms,
random generators) is remembered before every update and put back. On a CPU the check costs nothing;
on a GPU the host waits once per update for one number.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctxops.finite import NonFinite
from segtrain import dist
from segtrain.train.blackbox import plain_parts, write_box
from segtrain.train.feed import Batch
from segtrain.train.passes import Passes
from segtrain.train.rng import generator_state, set_generator_state
from segtrain.train.state import TrainingState

if TYPE_CHECKING:
    from segtrain.config.schema import RunConfig

GRADIENT_NORM = "grad_norm"


class BrokenUpdate(Exception):  # noqa: N818, it is no error until the policy says so
    """An update that was given up: the weights are those before it.

    Args:
        parts: Micro batches of this process.
        counts: What the losses were divided by.
        values: Losses and the norm of the gradient, of this process.
    """

    def __init__(
        self, parts: Sequence[Batch], counts: Mapping[str, Tensor], values: Mapping[str, Tensor]
    ) -> None:
        super().__init__("an update is not finite")
        self.parts, self.counts, self.values = list(parts), counts, values

    def what(self) -> str:
        """Whether it is the loss or, that being finite, the gradient; a call of all processes."""
        own = any(not math.isfinite(v) for k, v in self.values.items() if k != GRADIENT_NORM)
        return "loss" if dist.any_process(own) else "gradient"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What is known of a broken update.

    Args:
        step: Its number, from 1.
        what: "loss" or "gradient".
        first: Where the first number is that is not finite; None if a second look found none.
        process: Whose batch it was.
        box: The black box, None where none was written.
        problem: Why it could not be written, if so.
    """

    step: int
    what: str
    first: NonFinite | None
    process: int
    box: Path | None = None
    problem: str = ""

    def text(self, fix: str = "") -> str:
        """What is wrong, and where it starts.

        Args:
            fix: What the user can do about it.

        Returns:
            One line.
        """
        said = f"the {self.what} of update {self.step} is not finite"
        said += f"; {fix}" if fix else ""
        if self.first is None:
            return said
        if self.what == "loss" and self.first.kind == "gradient":
            return f"{said}; all outputs of the model are finite, the loss makes it"
        return f"{said}; it starts in {self.first.module} ({self.first.kind}: {self.first.detail})"

    def record(self, done: str) -> dict[str, Any]:
        """For the journal.

        Args:
            done: What came of it: "stop", "skip", "rewind".

        Returns:
            Plain types.
        """
        box = None if self.box is None else f"{self.box.parent.name}/{self.box.name}"
        return {"update": self.step, "done": done, **self.plain(), "box": box}

    def plain(self) -> dict[str, Any]:
        """What was found, in plain types."""
        first = None if self.first is None else asdict(self.first)
        return {"what": self.what, "first": first, "process": self.process}


class Guard:
    """Remembers the state before an update, and looks at those that broke.

    Args:
        config: Of the run.
        folder: Of the run.
        state: In training.
        passes: Of an update.
    """

    def __init__(
        self, config: "RunConfig", folder: Path, state: TrainingState, passes: Passes
    ) -> None:
        self._config, self._folder = config, folder
        self._state, self._passes = state, passes
        self._kept: dict[str, Tensor] = {}
        self._generators: dict[str, Any] = {}

    @torch.no_grad()
    def remember(self) -> None:
        """Keep what a forward pass may change."""
        self._generators = generator_state()
        now = dict(self._state.model.named_buffers())
        if self._kept.keys() != now.keys():
            self._kept = {name: value.clone() for name, value in now.items()}
        elif now:
            torch._foreach_copy_(list(self._kept.values()), list(now.values()))

    @torch.no_grad()
    def put_back(self) -> None:
        """Go back to what was kept, without gradients."""
        for name, value in self._state.model.named_buffers():
            value.copy_(self._kept[name])
        self._state.optimizer.zero_grad(set_to_none=True)
        set_generator_state(self._generators)

    def is_broken(self, values: Mapping[str, Tensor]) -> bool:
        """Whether an update must not be made; a call of all processes.

        Args:
            values: Losses and the norm of the gradient.

        Returns:
            The same everywhere. With fp16 only losses count: there the scaler looks at gradients.
        """
        scaled = self._state.scaler.is_enabled()
        looked = [v.float() for k, v in values.items() if not (scaled and k == GRADIENT_NORM)]
        return dist.any_process(not torch.isfinite(torch.stack(looked)).all().item())

    def look(self, broken: BrokenUpdate, *, rate: float, boxes: int | None) -> Finding:
        """Put everything back, make the passes again under a watch, write the black box.

        A call of all processes, each of which looks at its own batch. The main one writes the
        batch of the first process that finds something.

        Args:
            broken: The update.
            rate: Its learning rate.
            boxes: How many black boxes there may be afterwards; None is any number.

        Returns:
            What was found.
        """
        self.put_back()
        what = broken.what()
        watch, losses = self._passes.looked_at(self._state.model, broken.parts, broken.counts)
        self.put_back()
        finite = all(math.isfinite(value) for values in losses.values() for value in values)
        looks = dist.gather_objects((finite, watch.first))
        process = _whose(looks)
        own = dist.rank() == process
        payload = self._payload(broken, watch.largest, losses) if own else None
        sent = dist.gather_objects(payload)[process]
        step = self._state.step + 1
        finding = Finding(step=step, what=what, first=looks[process][1], process=process)
        weights = self._state.weights()
        if not dist.is_main():
            return finding
        content = {"config": self._config.model_dump(), "step": step, "lr": rate, **sent}
        content |= {"processes": dist.world_size(), **finding.plain(), "model": weights}
        try:
            return replace(finding, box=write_box(self._folder, content, most=boxes))
        except (OSError, RuntimeError) as error:  # the latter is what torch.save says
            return replace(finding, problem=str(error).splitlines()[0][:100])

    def _payload(
        self, broken: BrokenUpdate, largest: dict[str, float], losses: dict[str, list[float]]
    ) -> dict[str, Any]:
        """What only the process knows whose batch it was."""
        return {
            "parts": plain_parts(broken.parts),
            "counts": {name: value.cpu() for name, value in broken.counts.items()},
            "generators": self._generators,
            "device": str(self._passes.device),
            "values": {name: value.item() for name, value in broken.values.items()},
            "losses": losses,
            "largest": largest,
        }


def _whose(looks: Sequence[tuple[bool, NonFinite | None]]) -> int:
    """The first process where something is not finite: in its forward pass, loss, backward pass."""
    tests = (
        lambda finite, first: first is not None and first.kind != "gradient",
        lambda finite, first: not finite,
        lambda finite, first: first is not None,
    )
    for test in tests:
        for process, look in enumerate(looks):
            if test(*look):
                return process
    return 0
