"""Processes of a run: who am I, and what all of them agree on.

`torchrun` starts the processes and tells each by the environment; without it there is one process
and nothing here communicates.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from segtrain.errors import UserError
from segtrain.watch import EXIT_CODE, Watch, connected, lost

# Torch's own limit says nothing of use; ours, which names a process, comes before it.
_LONGEST_WAIT = timedelta(minutes=60)
_PATIENCE = 30.0  # minutes
_watch: Watch | None = None


def rank() -> int:
    """Number of this process, from 0; known before the processes have met, and afterwards."""
    return dist.get_rank() if _joined() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if _joined() else 1


def is_main() -> bool:
    """Whether this process writes files and talks."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if _joined():
        meets()
        dist.barrier()


def sum_over_processes(values: Tensor) -> Tensor:
    """Element-wise sum.

    Args:
        values: Of the same shape everywhere; left as they are.

    Returns:
        The sums, the same everywhere.
    """
    return _reduced(values, dist.ReduceOp.SUM)


def max_over_processes(values: Tensor) -> Tensor:
    """Element-wise maximum.

    Args:
        values: Of the same shape everywhere; left as they are.

    Returns:
        The maxima, the same everywhere.
    """
    return _reduced(values, dist.ReduceOp.MAX)


def any_process(answer: bool) -> bool:
    """Whether any process says yes.

    Args:
        answer: Of this process.

    Returns:
        The same everywhere.
    """
    return bool(max_over_processes(torch.tensor(float(answer))).item())


def share_buffers(module: nn.Module) -> None:
    """Give everybody the buffers of the main process; a call of all processes.

    Args:
        module: The same everywhere but for its buffers, which change in place.
    """
    for buffer in module.buffers() if _joined() else ():
        meets()
        dist.broadcast(buffer, src=0)


def gather_objects(item: Any) -> list[Any]:
    """What every process has, in the order of their ranks.

    Args:
        item: Small and plain.

    Returns:
        One item per process, on every process.
    """
    if not _joined():
        return [item]
    meets()
    items = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the processes that `torchrun` started, and leave them at the end.

    Yields:
        The device of this process: its GPU where there is one, else the CPU.
    """
    device = _device(int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ or _joined():
        yield device
        return
    # What the processes agree on lies on the CPU, so that nobody waits for a GPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_LONGEST_WAIT)
    try:
        with _watched(), _ends_explained():
            yield device
    finally:
        dist.destroy_process_group()


@contextmanager
def _watched() -> Iterator[None]:
    global _watch
    _watch = connected(rank=rank(), world=world_size(), patience=60 * _PATIENCE)
    try:
        yield
    finally:
        _watch.stop()
        _watch = None


@contextmanager
def _ends_explained() -> Iterator[None]:
    """Name a process that has ended, where the connection to it breaks off."""
    try:
        yield
    except RuntimeError as error:
        if _watch is None or not _is_broken_off(error):
            raise
        if threading.current_thread() is threading.main_thread():
            # `torchrun` tells all to end, and gives them half a minute.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        gone = _watch.gone()
        if not gone:
            raise
        if rank() != min(set(range(world_size())) - set(gone)):
            sys.exit(EXIT_CODE)  # another one tells
        raise UserError(lost(gone)) from error


def _is_broken_off(error: RuntimeError) -> bool:
    """Whether an error is one of a connection to another process."""
    kinds = (dist.DistBackendError, dist.DistNetworkError)
    return isinstance(error, kinds) or "gloo/transport" in str(error)


def came_to(place: str) -> None:
    """Note where this process is, for the message about one that does not arrive.

    Args:
        place: Such as "update 12".
    """
    if _watch is not None:
        _watch.came_to(place)


def meets() -> None:
    """Note that this process goes to where it waits for all; the functions here do so."""
    if _watch is not None:
        _watch.meets()


def set_patience(minutes: float) -> None:
    """Say after how long without any progress of any process all of them end.

    Args:
        minutes: The time.
    """
    if _watch is not None:
        _watch.patience = 60 * minutes


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"process {local_rank} of this machine has no GPU of its own, there are "
            f"{torch.cuda.device_count()}; start at most that many (torchrun --nproc-per-node)"
        )
    return torch.device("cuda", local_rank)


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _reduced(values: Tensor, operation: Any) -> Tensor:
    if not _joined():
        return values
    meets()
    total = values.clone()
    dist.all_reduce(total, operation)
    return total
