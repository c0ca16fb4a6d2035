"""One update of the weights, which is dropped where a number is not finite.

Detectron2 looks at the losses only, after it has computed the gradients, and ends in an exception
that says neither where the number came from nor how to go on.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.engine import SimpleTrainer
from detectron2.layers import FrozenBatchNorm2d
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from d2ctx.recovery.rng import State, generator_state

Batch = list[dict[str, Any]]
GRADIENT = "gradient"  # the name of the largest one in `Failure.values`
RAISED = "loss"  # the name of the only one where the model's own checks found NaN


@dataclass(frozen=True)
class Before:
    """What a second look at an update needs and the update changes before it is known to fail.

    Args:
        generators: Random generators before the forward pass.
        buffers: Of the plain model, by name, but for norms that are frozen.
    """

    generators: State
    buffers: dict[str, Tensor]


@dataclass(frozen=True)
class Failure:
    """An update that was dropped; the weights are those before it.

    Args:
        batch: Of this process.
        before: Of this process.
        values: Losses of this process, and `GRADIENT`.
        finite: For each process, whether the numbers of its own are finite.
    """

    batch: Batch
    before: Before
    values: dict[str, float]
    finite: list[bool]


class GuardedTrainer(SimpleTrainer):
    """Detectron2's `SimpleTrainer` and `AMPTrainer` with a look at the numbers before each update.

    All processes learn of a failure of one, and of a signal that one got, from the one message
    that they exchange anyway.

    Args:
        model: The model, or `DistributedDataParallel` around it.
        loader: Endless batches; iterated over when the first is needed.
        optimizer: Of the model.
        amp: Whether to use mixed precision.
        asked: Whether this process was asked to stop.

    Attributes:
        failure: Of the last update; None after a good one.
        stopping: Whether any process was asked to stop.
        losses: Of the last good update, means over the processes.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Any,
        optimizer: torch.optim.Optimizer,
        *,
        amp: bool,
        asked: Callable[[], bool],
    ) -> None:
        super().__init__(model, loader, optimizer)
        self.plain = model.module if isinstance(model, DistributedDataParallel) else model
        self.device = next(model.parameters()).device.type
        self.amp, self.asked = amp, asked
        self.grad_scaler = torch.amp.GradScaler(self.device) if amp else None
        self.failure: Failure | None = None
        self.stopping, self.losses = False, {}
        self._batches: Iterator[Batch] | None = None

    def run_step(self) -> None:
        """Forward, backward, and the update unless a number is not finite."""
        assert self.model.training, "the model was left in evaluation mode"
        start = time.perf_counter()
        self._batches = self._batches or iter(self.data_loader)
        batch = next(self._batches)
        waited = time.perf_counter() - start
        before = Before(generator_state(), self._buffers())
        losses = self.forward_backward(self.model, batch)
        values = self._values(losses)
        everyone = self._exchange(values, waited)
        # A gradient that is not finite is everyone's: the loss tells whose it was.
        loss, gradient = ([told[key] for told in everyone] for key in ("finite", "gradient"))
        finite = gradient if all(loss) else loss
        self.failure = None
        if all(finite):
            self._log(everyone)
            self._update()
        else:
            self.failure = Failure(batch, before, values, finite)
            self.undo(before)

    def restart_data(self) -> None:
        """Take the next batch from a new iterator: the loader was told to be elsewhere."""
        self._batches = None

    def precision(self) -> AbstractContextManager[Any]:
        """What the forward pass runs in."""
        return torch.autocast(self.device, enabled=self.amp)

    def forward_backward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Losses and fresh gradients.

        Args:
            model: `self.model` or the plain one in it.
            batch: For the model.

        Returns:
            Loss name -> loss.
        """
        with self.precision(), nan_instead_of_exception(self.plain):
            losses = model(batch)
            if isinstance(losses, Tensor):
                losses = {"total_loss": losses}
            total = sum(losses.values())
        self.optimizer.zero_grad()
        scaled = total if self.grad_scaler is None else self.grad_scaler.scale(total)
        scaled.backward()
        return losses

    def undo(self, before: Before) -> None:
        """Leave no trace of a forward and backward pass but in the random generators.

        Args:
            before: The passes.
        """
        self.optimizer.zero_grad()
        buffers = dict(self.plain.named_buffers())
        with torch.no_grad():
            for name, value in before.buffers.items():
                buffers[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """As Detectron2's trainers."""
        scaler = {} if self.grad_scaler is None else {"grad_scaler": self.grad_scaler.state_dict()}
        return {**super().state_dict(), **scaler}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Args:
            state_dict: With a scaler where mixed precision is on.
        """
        super().load_state_dict(state_dict)
        if self.grad_scaler is not None:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])

    def _buffers(self) -> dict[str, Tensor]:
        found = {}
        for prefix, module in self.plain.named_modules():
            if not isinstance(module, FrozenBatchNorm2d):
                for name, buffer in module.named_buffers(prefix, recurse=False):
                    found[name] = buffer.detach().clone()
        return found

    def _values(self, losses: Mapping[str, Tensor]) -> dict[str, float]:
        """Losses and the largest gradient, waiting for the device once.

        Under mixed precision gradients that are not finite are normal: the scaler sees to them.
        """
        found = {name: loss.detach().double().reshape(()) for name, loss in losses.items()}
        if self.grad_scaler is None:
            parts = [p.grad for p in self.plain.parameters() if p.grad is not None]
            found[GRADIENT] = nn.utils.get_total_norm(parts, math.inf).double()
        device = next(iter(found.values())).device
        numbers = torch.stack([value.to(device) for value in found.values()]).tolist()
        return dict(zip(found, numbers, strict=True))

    def _exchange(self, values: dict[str, float], waited: float) -> list[dict[str, Any]]:
        losses = {name: value for name, value in values.items() if name != GRADIENT}
        told = {
            "losses": losses,
            "finite": all(map(math.isfinite, losses.values())),
            "gradient": math.isfinite(values.get(GRADIENT, 0.0)),
            "data_time": waited,
            "asked": self.asked(),
        }
        everyone = comm.all_gather(told)
        self.stopping = any(other["asked"] for other in everyone)
        if all(other["finite"] for other in everyone):
            self.losses = {n: float(np.mean([o["losses"][n] for o in everyone])) for n in losses}
        return everyone

    def _log(self, everyone: list[dict[str, Any]]) -> None:
        """Give Detectron2's writers what its own trainers give them."""
        if not comm.is_main_process():
            return
        storage = get_event_storage()
        storage.put_scalar("data_time", max(told["data_time"] for told in everyone))
        storage.put_scalar("total_loss", sum(self.losses.values()))
        if len(self.losses) > 1:
            storage.put_scalars(**self.losses)

    def _update(self) -> None:
        if self.grad_scaler is None:
            self.optimizer.step()
        else:
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()


@contextmanager
def nan_instead_of_exception(model: nn.Module) -> Iterator[None]:
    """Let a model whose own checks find NaN give a loss that is NaN.

    Detectron2's region proposals and boxes end in an exception. Of several processes, the others
    would wait for the gradients of that one for ever.

    Args:
        model: The plain module, changed inside.

    Yields:
        Nothing.
    """
    forward, own = model.forward, "forward" in vars(model)

    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except (FloatingPointError, AssertionError) as error:
            if isinstance(error, AssertionError) and "NaN" not in str(error):
                raise
            return {RAISED: sum(p.sum() for p in model.parameters() if p.requires_grad) * math.nan}

    model.forward = guarded
    try:
        yield
    finally:
        if own:
            model.forward = forward
        else:
            del model.forward
