"""Timing, peak memory and metadata shared by all benchmarks."""

import ctypes
import gc
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

RESULTS = Path(__file__).with_name("results")
PROC = Path("/proc/self")
MIN_ROUNDS = 3
MAX_ROUNDS = 21
MEASURED = ("ctxops", "segtrain", "d2ctx", "benchmarks/*.py")  # what results depend on


def synchronize(device: str) -> None:
    """Wait for an accelerator; nothing on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def time_phases(
    phases: Sequence[Callable[[], None]],
    *,
    device: str,
    warmup: int,
    seconds: float,
    min_rounds: int = MIN_ROUNDS,
) -> list[list[float]]:
    """Run the phases one after the other, again and again, and time each of them.

    Args:
        phases: Functions that depend on each other, such as a forward and a backward pass.
        device: `cpu` or `cuda`.
        warmup: Rounds that are not measured.
        seconds: Stop after this time, but not before `min_rounds` and not after twenty-one rounds.
        min_rounds: Fewest measured rounds.

    Returns:
        Seconds per round, for each phase.
    """
    durations: list[list[float]] = [[] for _ in phases]
    for _ in range(warmup):
        for phase in phases:
            phase()
    begin = time.perf_counter()
    while len(durations[0]) < min_rounds or (
        len(durations[0]) < MAX_ROUNDS and time.perf_counter() - begin < seconds
    ):
        for phase, measured in zip(phases, durations, strict=True):
            synchronize(device)
            start = time.perf_counter()
            phase()
            synchronize(device)
            measured.append(time.perf_counter() - start)
    return durations


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median, fastest and inter-quartile range in milliseconds, and the number of rounds."""
    lower, _, upper = quantiles(seconds, n=4) if len(seconds) > 1 else (0.0, 0.0, 0.0)
    return {
        "median_ms": 1e3 * median(seconds),
        "fastest_ms": 1e3 * min(seconds),
        "iqr_ms": 1e3 * (upper - lower),
        "rounds": len(seconds),
    }


def peak_growth_mib(run: Callable[[], None], *, device: str) -> float:
    """Growth of the peak memory while `run` runs, in MiB.

    On a CPU this is the resident set of the process: call it in a process of its own, after a
    warm-up. Linux can reset the peak; elsewhere the peak since the start is what there is.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        synchronize(device)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    _reset_peak()
    before = _peak_kib()
    run()
    return (_peak_kib() - before) / 2**10


def limit_memory() -> None:
    """Make allocations beyond the memory that is free now fail, instead of ending other work."""
    info = Path("/proc/meminfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines())
        free = 1024 * int(fields["MemAvailable"].split()[0])
        resource.setrlimit(resource.RLIMIT_DATA, (free, free))


def _reset_peak() -> None:
    gc.collect()
    if sys.platform == "linux":
        # Freed blocks that the C library keeps would hide the growth.
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)
        (PROC / "clear_refs").write_text("5")


def _peak_kib() -> float:
    if not (PROC / "status").exists():
        scale = 1024 if sys.platform == "darwin" else 1
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
    fields = dict(line.split(":", 1) for line in (PROC / "status").read_text().splitlines())
    return float(fields["VmHWM"].split()[0])


def metadata(*, device: str, seed: int) -> dict[str, Any]:
    """What a reader needs to run it again: hardware, versions, commit, command, seed, date."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", *sys.orig_argv[sys.orig_argv.index("-m") + 1 :]]),
        "commit": _git("rev-parse", "HEAD"),
        "modified_packages": bool(_git("status", "--porcelain", "--", *MEASURED)),
        "seed": seed,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hardware": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "load_average_at_end": os.getloadavg(),
        "platform": platform.platform(),
    }


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent.parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    return f"{names[0]}, {len(names)} logical cores" if names else platform.processor()


def save(name: str, content: dict[str, Any]) -> Path:
    """Write `results/<date>-<name>.json`.

    Args:
        name: What was measured, and on which kind of device.
        content: Metadata and results.

    Returns:
        The file.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{datetime.now(UTC).date().isoformat()}-{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path
