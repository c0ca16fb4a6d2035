"""Two processes that are started as `torchrun` does it."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

_LOOK = 1.0  # seconds


class Ended(NamedTuple):
    """What a process left behind.

    Attributes:
        code: Exit code; negative where a signal ended it.
        out: What it said on stdout.
        errors: And on stderr.
    """

    code: int
    out: str
    errors: str


def launched(script: str, folder: Path, *, timeout: float = 240) -> tuple[list[str], list[str]]:
    """Run a script in both; what each said, on stdout and on stderr."""
    ended = started(script, folder, timeout=timeout)
    return [one.out for one in ended], [one.errors for one in ended]


def started(
    script: str, folder: Path, *, timeout: float = 240, wait_for: int | None = None
) -> list[Ended]:
    """Run a script in both, or until one of them has ended.

    Args:
        script: Python, which finds `folder` in its arguments.
        folder: Of the test.
        timeout: Seconds for all.
        wait_for: The process after whose end the other one is killed; None waits for both.

    Returns:
        What became of each.
    """
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(folder)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = {}
        if wait_for is not None:
            said[wait_for] = _said(processes[wait_for], timeout)
            processes[1 - wait_for].kill()
        for rank in {0, 1} - said.keys():
            said[rank] = _said(processes[rank], timeout)
    finally:
        for process in processes:  # where one failed, the other waits for it
            process.kill()
    return [Ended(process.returncode, *said[rank]) for rank, process in enumerate(processes)]


def _said(process: subprocess.Popen, timeout: float) -> tuple[str, str]:
    """What a process says until it ends. Time in which this one was suspended does not count."""
    waited = 0.0
    while True:
        start = time.monotonic()
        try:
            return process.communicate(timeout=_LOOK)
        except subprocess.TimeoutExpired:
            waited += min(time.monotonic() - start, 2 * _LOOK)
            if waited > timeout:
                raise


def free_port() -> int:
    """Of this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
