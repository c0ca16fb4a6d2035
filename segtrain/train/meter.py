"""Losses and speed between two lines of the journal, without waiting for the device every step."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from segtrain import dist


class Meter:
    """Collects what the updates report; reading it is a call of all processes.

    Args:
        device: Where the losses are.
        images: Images of an update, over all processes.
    """

    def __init__(self, device: torch.device, *, images: int) -> None:
        self._device, self._images = device, images
        self._rows: list[Mapping[str, Tensor]] = []  # of updates that nobody has taken yet
        self._first = 0  # the update of the first row
        self._restart()

    def _restart(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._updates = self._skipped = 0
        self._started = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time of the body: evaluation, saving."""
        before = time.perf_counter()
        yield
        self._started += time.perf_counter() - before

    def add(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Take an update in.

        Args:
            step: Its number, from 1.
            values: This process's part of every loss of the update, whose mean over the processes
                is the loss, and more numbers of that kind; empty where the update was skipped.
        """
        if not self._rows:
            self._first = step
        self._rows.append({name: value.detach().float() for name, value in values.items()})
        for name, value in self._rows[-1].items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._updates += 1
        self._skipped += not values

    def read(self) -> dict[str, float]:
        """Means since the last call, which start anew; skipped updates do not count.

        Returns:
            "loss" (the sum of the losses, NaN where all updates were skipped), every number by its
            name, and "images_per_second".
        """
        names = list(self._sums)
        means = _over_processes([self._sums], names)[0] if names else []
        record = {n: v / (self._updates - self._skipped) for n, v in zip(names, means, strict=True)}
        losses = [value for name, value in record.items() if name.startswith("loss")]
        record = {"loss": sum(losses) if losses else math.nan, **record}
        seconds = time.perf_counter() - self._started
        record["images_per_second"] = self._images * self._updates / seconds
        self._restart()
        return record

    def take_updates(self) -> dict[str, dict[str, int | list[float]]]:
        """The numbers of every update since the last call.

        Returns:
            "updates": "first" is the number of the first update, all others are lists, with NaN
            where an update was skipped. Nothing where there was no update.
        """
        rows, self._rows = self._rows, []
        if not rows:
            return {}
        names = list(max(rows, key=len))
        table = _over_processes(rows, names) if names else [[] for _ in rows]
        columns = {name: [row[k] for row in table] for k, name in enumerate(names)}
        return {"updates": {"first": self._first, "count": len(rows), **columns}}


def _over_processes(rows: list[Mapping[str, Tensor]], names: list[str]) -> list[list[float]]:
    """Mean over the processes of every number of every row; NaN in rows that are empty."""
    missing = torch.full((len(names),), torch.nan)
    stacked = [
        torch.stack([row[name] for name in names]) if row else missing.clone() for row in rows
    ]
    device = next((row[names[0]].device for row in rows if row), missing.device)
    table = torch.stack([row.to(device) for row in stacked])
    return (dist.sum_over_processes(table) / dist.world_size()).tolist()
