"""The command line of the benchmarks that are made of cases; each form runs in its own process."""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.cases.case import Case
from benchmarks.common import limit_memory, metadata, save
from benchmarks.measure import SEED, Setting, measure
from benchmarks.rows import Row, as_json


def parser(description: str, *, seconds: float = 4.0) -> argparse.ArgumentParser:
    """The options that all of them have."""
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    made.add_argument("--only", default="", help="cases whose name contains this")
    made.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    made.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's choice")
    made.add_argument(
        "--seconds", type=float, default=seconds, help="measured time per form and process"
    )
    made.add_argument("--measure", nargs=2, metavar=("CASE", "FORM"), help=argparse.SUPPRESS)
    return made


def start(options: argparse.Namespace, cases: Mapping[str, Case]) -> Setting | None:
    """Set what a measurement depends on; None if this process was to measure one form, and has."""
    if options.threads:
        torch.set_num_threads(options.threads)
    setting = Setting(device=options.device, seconds=options.seconds, threads=options.threads)
    if not options.measure:
        return setting
    case, form = options.measure
    if options.device == "cpu":
        limit_memory()
    print(json.dumps(measure(cases[case], form, setting)))
    return None


def finish(
    name: str,
    rows: Sequence[Row],
    details: dict[str, Any],
    options: argparse.Namespace,
    *,
    known: Iterable[str],
) -> None:
    """Write the results.

    Raises:
        SystemExit: If `--only` left nothing.
    """
    if not rows:
        raise SystemExit(f"no case contains {options.only!r}; known: {', '.join(known)}")
    where = options.device if options.device == "cuda" else f"cpu{torch.get_num_threads()}"
    content = as_json(rows, metadata(device=options.device, seed=SEED), details=details)
    print("written:", save(f"{name}-{where}", content))
