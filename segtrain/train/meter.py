"""Losses and speed between two lines of the journal, without waiting for the device every step."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from segtrain import dist
from segtrain.errors import UserError


class Meter:
    """Sums what the updates report; reading it is a call of all processes.

    Args:
        device: Where the losses are.
        images: Images of an update, over all processes.
    """

    def __init__(self, device: torch.device, *, images: int) -> None:
        self._device, self._images = device, images
        self._broken = torch.full((), -torch.inf, device=device)  # - first step without a number
        self._restart()

    def _restart(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._updates, self._started = 0, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time of the body: evaluation, saving."""
        before = time.perf_counter()
        yield
        self._started += time.perf_counter() - before

    def add(self, step: int, losses: Mapping[str, Tensor]) -> None:
        """Take an update in.

        Args:
            step: Its number, from 1.
            losses: This process's part of every loss of the update, whose mean over the processes
                is the loss.
        """
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().float()
            is_number = torch.isfinite(value.detach())
            self._broken = torch.where(is_number, self._broken, self._broken.clamp(min=-step))
        self._updates += 1

    def check(self) -> None:
        """Stop where a loss was not a number.

        Raises:
            UserError: Naming the first such update.
        """
        broken = dist.max_over_processes(self._broken).item()
        if broken > -torch.inf:
            raise UserError(
                f"the loss of update {-broken:.0f} is not finite; lower optim.lr, set "
                "optim.clip_norm or schedule.warmup_iters, or write train.precision: fp32; the "
                "last checkpoint is from before"
            )

    def read(self) -> dict[str, float]:
        """Means since the last call, which start anew.

        Returns:
            "loss" (the sum) and every loss by its name, and "images_per_second".

        Raises:
            UserError: As `check`.
        """
        self.check()
        names = list(self._sums)
        total = dist.sum_over_processes(torch.stack([self._sums[name] for name in names]))
        means = (total / self._updates / dist.world_size()).tolist()
        seconds = time.perf_counter() - self._started
        record = {"loss": sum(means), **dict(zip(names, means, strict=True))}
        record["images_per_second"] = self._images * self._updates / seconds
        self._restart()
        return record
