"""What a run says while it trains: a bar with numbers on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self, TextIO

import torch

from segtrain import dist

_PLAIN_SECONDS = 10.0  # least time between two plain lines


class Progress:
    """Shows the newest record; silent on processes other than the main one.

    Args:
        total: Updates of the whole run.
        done: Updates done before.
        stream: Where to write; None is stderr.
    """

    def __init__(self, *, total: int, done: int = 0, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._total, self._first = total, done
        self._started = time.monotonic()
        self._printed = -float("inf")
        self._silent = not dist.is_main()
        self._bar = None if self._silent or not self._stream.isatty() else _bar(self._stream)
        if self._bar is not None:
            self._task = self._bar.add_task("", total=total, completed=done, numbers="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int) -> None:
        """Move the bar.

        Args:
            step: Updates done.
        """
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def show(self, step: int, record: Mapping[str, Any]) -> None:
        """Show the numbers of a journal record.

        Args:
            step: Updates done.
            record: As written to the journal.
        """
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers(record))
            return
        now = time.monotonic()
        due = now - self._printed >= _PLAIN_SECONDS or step == self._total
        if due and not self._silent:
            self._printed = now
            self._print(f"step {step}/{self._total}  {numbers(record)}  {self._left(step, now)}")

    def note(self, text: str) -> None:
        """Print a line that stays.

        Args:
            text: The line.
        """
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif not self._silent:
            self._print(text)

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def _left(self, step: int, now: float) -> str:
        done = step - self._first
        seconds = (now - self._started) / done * (self._total - step) if done else 0
        return f"{duration(seconds)} left"


def counter(text: str, *, stream: TextIO | None = None) -> Callable[[int, int], None]:
    """Say how far something is that comes before training.

    Args:
        text: What it is.
        stream: Where to write; None is stderr.

    Returns:
        A function of (done, total): one line that counts up on a terminal, else a line every so
        often.
    """
    stream = stream or sys.stderr
    said = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal said
        if stream.isatty():
            print(f"\r{text} {done}/{total}", end="\n" * (done == total), file=stream, flush=True)
        elif time.monotonic() - said >= _PLAIN_SECONDS:
            said = time.monotonic()
            print(f"{text} {done}/{total}", file=stream, flush=True)

    return show


def numbers(record: Mapping[str, Any]) -> str:
    """The numbers of a record in one short text.

    Args:
        record: With "loss", "lr", "images_per_second", "memory_mb" and more losses, if there.

    Returns:
        Such as "loss 1.234  lr 9.1e-04  23.4 img/s  812 MB".
    """
    losses = [key for key in record if key.startswith("loss")]
    shown = losses if len(losses) > 2 else losses[:1]  # a single term is the sum
    parts = [f"{key.removeprefix('loss_')} {record[key]:.4g}" for key in shown]
    parts.append(f"lr {record['lr']:.2e}")
    parts.append(f"{record['images_per_second']:.1f} img/s")
    if record.get("memory_mb") is not None:
        parts.append(f"{record['memory_mb']:.0f} MB")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as 1:02:03.

    Args:
        seconds: At least 0.

    Returns:
        The text.
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def memory_mb(device: torch.device) -> float | None:
    """Most memory used so far: on the GPU, or of this process where there is none.

    Args:
        device: Of the model.

    Returns:
        MiB; None where the system does not tell (Windows without a GPU).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # no such module on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _bar(stream: TextIO) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
        console=Console(file=stream),
    )
