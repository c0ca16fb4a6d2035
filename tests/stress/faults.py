"""What goes wrong in a run: each function is called in its process before the program starts."""

import mmap
import os
import platform
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

PHASES = ("start", "step", "evaluate", "save", "between")


def one_thread() -> None:
    torch.set_num_threads(1)


def tell_phase(path: str) -> None:
    """Keep the number of the current phase of `PHASES` as the one byte of a file, which exists."""
    from segtrain.train import loop

    during = _marked(Path(path))
    loop.Run.update = during("step", loop.Run.update)  # type: ignore[method-assign]
    loop.Run.evaluate = during("evaluate", loop.Run.evaluate)  # type: ignore[method-assign]
    loop.save_checkpoint = during("save", loop.save_checkpoint)


def tell_phase_d2(path: str) -> None:
    """As `tell_phase`, for d2ctx."""
    from d2ctx import trainer
    from d2ctx.recovery.hooks import Checkpoints

    during, ours = _marked(Path(path)), trainer.Trainer
    ours.run_step = during("step", ours.run_step)  # type: ignore[method-assign]
    ours._evaluate = during("evaluate", ours._evaluate)  # type: ignore[method-assign]
    Checkpoints._write = during("save", Checkpoints._write)  # type: ignore[method-assign]


def _marked(path: Path) -> Callable[[str, Callable[..., Any]], Callable[..., Any]]:
    """What makes of a phase and a function one that tells when it runs."""
    byte = _shared_byte(path)

    def during(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **keywords: Any) -> Any:
            byte[0] = PHASES.index(name)
            result = function(*arguments, **keywords)
            byte[0] = PHASES.index("between")
            return result

        return called

    return during


def _shared_byte(path: Path) -> mmap.mmap:
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), 1)


def end_at_change(folder: str, number: int = 1, what: str = "*") -> None:
    """End without a word right before the n-th change of a file below `folder`.

    `what` is a pattern of changes, such as "os.rename checkpoints/last.pt"; a file that is opened
    for writing changes.
    """
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.truncate")
        if not (changes or (event == "open" and _writes(arguments))):
            return
        path = str(arguments[0])
        if path != folder and not path.startswith(f"{folder}/"):
            return
        seen += fnmatch(f"{event} {path[len(folder) + 1 :]}", what)
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def _writes(arguments: tuple[Any, ...]) -> bool:
    return bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def largest_file(size: int) -> None:
    """No file may grow beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def other_machine(name: str, seconds: float) -> None:
    """Another host name, and a clock that is so many seconds ahead."""
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + int(seconds * 1e9)
    socket.gethostname = lambda: name
    platform.node = lambda: name


def fail_in_update(number: int) -> None:
    """Raise an error in the n-th update of the process."""
    from segtrain.train import loop

    update, seen = loop.Run.update, 0

    def failing(*arguments: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == number:
            raise MemoryError("injected")
        return update(*arguments)

    loop.Run.update = failing  # type: ignore[method-assign]


def environment(**variables: str) -> None:
    """Variables of the environment; the rank and number of processes among them."""
    os.environ.update(variables)
