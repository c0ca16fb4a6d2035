"""`python -m d2ctx.report RUN [RUN ...]`: a table of results, and a plot of losses and scores."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
from tabulate import tabulate

from d2ctx.errors import exit_code
from d2ctx.runs import run_metrics, run_results

TASKS = {"bbox": "box", "segm": "mask", "panoptic_seg": "panoptic"}
_AP, _PQ = ("AP", "AP50", "AP75"), ("PQ", "SQ", "RQ")
# Task and score of each column.
DETECTION = {(task, score): f"{TASKS[task]} {score}" for task in ("bbox", "segm") for score in _AP}
PANOPTIC = {("panoptic_seg", score): score for score in _PQ}
# What is plotted of each task, against the iteration.
PLOTTED = {"bbox": "AP50", "segm": "AP50", "panoptic_seg": "PQ"}
STYLES = {"bbox": "-", "segm": "--", "panoptic_seg": ":"}


def results_table(runs: Sequence[Path]) -> str:
    """AP of every run, one line each, or one for each of its test sets.

    Panoptic quality has columns where a run has it.

    Raises:
        UserError: If a folder is not an evaluated run.
    """
    lines = [line for run in runs for line in _by_line(run).items()]  # names may be alike
    panoptic = any("panoptic_seg" in found for _, found in lines)
    columns = DETECTION | (PANOPTIC if panoptic else {})
    rows = [
        [name, *(found.get(task, {}).get(score) for task, score in columns)]
        for name, found in lines
    ]
    return tabulate(rows, ["run", *columns.values()], floatfmt=".1f")


def _by_line(run: Path) -> dict[str, Any]:
    results = run_results(run)
    if results.keys() & TASKS.keys():
        return {run.name: results}
    return {f"{run.name} {dataset}": scores for dataset, scores in results.items()}


def write_curves(runs: Sequence[Path], path: Path) -> Path:
    """Plot total loss, AP50 and PQ against the iteration for one or several runs.

    Args:
        runs: Output folders.
        path: PNG to write.

    Returns:
        `path`.

    Raises:
        UserError: If a folder is not a training run.
    """
    figure = matplotlib.figure.Figure(figsize=(11, 4), layout="constrained")
    loss, score = figure.subplots(1, 2)
    for color, run in enumerate(runs):
        records = list(run_metrics(run))
        loss.plot(*_series(records, "total_loss"), f"C{color}", label=run.name)
        for key in _score_keys(records):
            *dataset, task, _ = key.split("/")
            label = " ".join([run.name, *dataset, TASKS.get(task, task)])
            score.plot(*_series(records, key), f"C{color}o{STYLES[task]}", label=label)
    loss.set(title="total loss", xlabel="iteration", yscale="log")
    score.set(title="AP50 and PQ on the test sets", xlabel="iteration", ylim=(0, 100))
    for axes in (loss, score):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=120)
    return path


def _score_keys(records: list[dict[str, Any]]) -> list[str]:
    ends = tuple(f"{task}/{score}" for task, score in PLOTTED.items())
    return sorted({key for record in records for key in record if key.endswith(ends)})


def _series(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    # A resumed run repeats the iterations after its checkpoint; those it went on from count.
    points = sorted({r["iteration"]: r[key] for r in records if key in r}.items())
    return [i for i, _ in points], [v for _, v in points]


def main(argv: Sequence[str] | None = None) -> int:
    """Command-line entry; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m d2ctx.report",
        description="Print the scores of one or several runs, and plot them with their losses.",
    )
    parser.add_argument("run", type=Path, nargs="+", help="output folder of a training run")
    parser.add_argument("--out", type=Path, help="plot to write (default: curves.png in the first)")
    args = parser.parse_args(argv)
    return exit_code(lambda: _print(args))


def _print(args: argparse.Namespace) -> None:
    print(results_table(args.run))
    print(f"wrote {write_curves(args.run, args.out or args.run[0] / 'curves.png')}")


if __name__ == "__main__":
    sys.exit(main())
