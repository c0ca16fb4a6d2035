"""Batches for training and evaluation.

Training sees one endless stream of samples, whatever the number of processes: epoch after epoch,
each in a shuffled order of its own. Global batch t is the t-th piece of the stream; it is dealt to
the processes, and by each to its accumulation steps, in order. So the update does not depend on how
a batch is split, and the position in the data is the number of updates alone.
"""

import atexit
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import count
from types import FrameType
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from segtrain.data.dataset import SegDataset, generator_of
from segtrain.errors import UserError

_LATER = 2.0  # seconds within which the system tells that a worker has ended
_BROKEN_OFF = (EOFError, ConnectionResetError, ConnectionRefusedError, ConnectionAbortedError)
_ORDER = 1  # keeps the stream of orders apart from those of the augmentation


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Micro batches of (epoch, index), endlessly.

    Args:
        num_samples: Size of the split.
        global_batch: Samples of an update, over all processes.
        micro_batch: Samples of a forward pass in one process; None takes its whole share.
        seed: Seed of the order.
        rank: Number of this process.
        world: Number of processes.
        shuffle: Whether each epoch has a random order.
        step: Updates that are already done.
    """

    def __init__(
        self,
        *,
        num_samples: int,
        global_batch: int,
        micro_batch: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
        step: int = 0,
    ) -> None:
        if min(num_samples, global_batch, world, micro_batch or 1) < 1 or not 0 <= rank < world:
            raise UserError(
                "expected at least one sample, batch and process, got "
                f"{num_samples} samples, batch {global_batch}, process {rank} of {world}"
            )
        micro_batch = micro_batch or max(global_batch // world, 1)
        if global_batch % (world * micro_batch):
            raise UserError(
                f"train.global_batch {global_batch} is no multiple of {world} processes x "
                f"micro batch {micro_batch}; change one of them"
            )
        self.num_samples, self.global_batch = num_samples, global_batch
        self.micro_batch, self.rank, self.world = micro_batch, rank, world
        self.seed, self.shuffle, self.step = seed, shuffle, step

    @property
    def accumulation(self) -> int:
        """Micro batches of one update in this process."""
        return self.global_batch // (self.world * self.micro_batch)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield micro batches from update `step` on."""
        share = self.global_batch // self.world
        keys = self._keys()
        for step in count(self.step):
            start = step * self.global_batch + self.rank * share
            for first in range(start, start + share, self.micro_batch):
                yield [keys(place) for place in range(first, first + self.micro_batch)]

    def state_dict(self, step: int) -> dict[str, int]:
        """The position after an update.

        Args:
            step: Updates that are done. Workers read ahead, so only the trainer knows.

        Returns:
            What `load_state_dict` takes.
        """
        return {"step": step, "global_batch": self.global_batch, "num_samples": self.num_samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position; call it before iterating.

        Args:
            state: Of `state_dict`.

        Raises:
            UserError: If the position is one of another split or batch.
        """
        for key in ("global_batch", "num_samples"):
            if state[key] != getattr(self, key):
                raise UserError(
                    f"the run was saved with {key} {state[key]}, now it is {getattr(self, key)}; "
                    "its position in the data would be another one"
                )
        self.step = state["step"]

    def _keys(self) -> Callable[[int], tuple[int, int]]:
        """(epoch, index) of a place in the stream; remembers the order of one epoch."""
        order = lru_cache(maxsize=2)(self._order)

        def key(place: int) -> tuple[int, int]:
            epoch, position = divmod(place, self.num_samples)
            return epoch, order(epoch)[position]

        return key

    def _order(self, epoch: int) -> Sequence[int]:
        if not self.shuffle:
            return range(self.num_samples)
        generator = generator_of(self.seed, epoch, _ORDER)
        return torch.randperm(self.num_samples, generator=generator).tolist()


@contextmanager
def dead_workers_explained(then: str) -> Iterator[None]:
    """Say in a line that a worker is dead; torch tells it anywhere, not only where a batch is due.

    Args:
        then: What to do afterwards.

    Yields:
        Nothing.

    Raises:
        UserError: If a worker ended that should not have.
    """
    try:
        yield
    except (RuntimeError, EOFError, ConnectionError) as error:
        said = _death_of_worker(error)
        if said is None:
            raise
        raise UserError(
            f"{said}; where the system ended it, memory was short: write fewer data.workers, or 0 "
            f"to load in the trainer itself, and {then}"
        ) from error


def _death_of_worker(error: BaseException) -> str | None:
    """What torch says of it; a batch on its way may break off a moment before torch knows."""
    if isinstance(error, _BROKEN_OFF):
        try:
            time.sleep(_LATER)
        except RuntimeError as later:
            error = later
        else:
            return "a data worker has ended without a word"
    said = str(error).splitlines()[0] if str(error) else ""
    return said.rstrip(". ") if said.startswith("DataLoader worker (pid") else None


def _end_workers() -> None:
    """End workers that were not told to: they would wait for their trainer, and it for them."""
    left = [child for child in multiprocessing.active_children() if child.daemon]
    if left and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would call it an error
    for child in left:
        child.kill()


# Before multiprocessing asks them to end, which they leave to the trainer, see `_end_next_time`.
atexit.register(_end_workers)


class Loader(DataLoader[dict[str, Any]]):
    """A loader that raises a worker's `UserError` as it was, one line instead of a traceback."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield batches.

        Raises:
            UserError: What the data set raised.
        """
        for batch in super().__iter__():
            if isinstance(batch, _Problem):
                raise UserError(batch.text)
            yield batch


class _Problem:
    """A message on its way out of a worker."""

    def __init__(self, text: str) -> None:
        self.text = text


class _Guarded(Dataset[Any]):
    """A data set that hands out its errors, to be raised by the loader."""

    def __init__(self, dataset: SegDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int] | int) -> Any:
        try:
            return self.dataset[key]
        except UserError as error:
            return _Problem(str(error))


def train_loader(
    dataset: SegDataset,
    sampler: EpochSampler,
    *,
    workers: int = 0,
    pin_memory: bool = False,
    context: str | None = None,
) -> Loader:
    """Endless training batches.

    Args:
        dataset: With a transform to crops of one size.
        sampler: Says which samples, from which update on.
        workers: Processes that load; 0 loads in this one. Batches do not depend on it.
        pin_memory: Whether to copy batches to page-locked memory, for a GPU.
        context: "spawn", "fork" or "forkserver"; None takes the platform's.

    Returns:
        A loader of {"image": [B, 3, h, w], "label": [B, h, w], "name": list, "index": [B]}.
    """
    return Loader(
        _Guarded(dataset),
        batch_sampler=sampler,
        collate_fn=_collate,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        multiprocessing_context=context if workers else None,
        persistent_workers=workers > 0,
        # Augmentation draws from its own generators; this one only keeps the global one still.
        generator=torch.Generator(),
    )


def val_loader(
    dataset: SegDataset,
    *,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
    context: str | None = None,
) -> Loader:
    """Every image of a split once, in order, one per batch; processes take turns.

    Args:
        dataset: With `EvalImage`, or no transform.
        rank: Number of this process.
        world: Number of processes; no image is seen twice.
        workers: Processes that load.
        pin_memory: Whether to copy batches to page-locked memory, for a GPU.
        context: "spawn", "fork" or "forkserver"; None takes the platform's.

    Returns:
        A loader of batches of one image.
    """
    return Loader(
        _Guarded(dataset),
        batch_sampler=[[index] for index in range(rank, len(dataset), world)],
        collate_fn=_collate,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        multiprocessing_context=context if workers else None,
        generator=torch.Generator(),
    )


def _collate(items: list[Any]) -> Any:
    problem = next((item for item in items if isinstance(item, _Problem)), None)
    return problem or default_collate(items)


def _start_worker(worker: int) -> None:
    """Workers share the cores, and leave signals to the process that started them."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_next_time)


def _end_next_time(number: int, frame: FrameType | None) -> None:
    """Schedulers tell all processes of a run to end; the trainer saves before it ends these."""
    signal.signal(number, signal.SIG_DFL)
