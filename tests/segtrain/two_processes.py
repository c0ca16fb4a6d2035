"""Two processes that are started as `torchrun` does it."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def launched(script: str, folder: Path, *, timeout: float = 120) -> tuple[list[str], list[str]]:
    """Run a script in both; what each said, on stdout and on stderr."""
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
        said = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:  # where one failed, the other waits for it
            process.kill()
    return [out for out, _ in said], [errors for _, errors in said]


def free_port() -> int:
    """Of this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
