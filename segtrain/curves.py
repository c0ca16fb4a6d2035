"""`segtrain runs`: losses and scores as a picture (`plot`); is a gain real (`compare`)."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segtrain.errors import UserError
from segtrain.files import replacing
from segtrain.train.journal import NAME as JOURNAL_NAME
from segtrain.train.journal import read_journal

_EPILOG = """examples:
  segtrain runs plot output/my
  segtrain runs plot output/one output/two --out both.png
  segtrain runs compare output/one output/two
  segtrain runs compare one.json two.json --samples 20000 --json
"""
# Event of the journal -> what is drawn of it, against the number of updates.
_DRAWN = {"train": "loss", "evaluate": "miou"}
Points = list[tuple[int, float]]


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `runs` and its sub-commands.

    Args:
        commands: The sub-parsers of the main parser.
    """
    runs = commands.add_parser(
        "runs",
        help="compare runs",
        description="Look at what runs have written; they may still be running.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).add_subparsers(metavar="COMMAND", required=True)
    plot = runs.add_parser("plot", help="draw losses and mIoU of one or several runs")
    plot.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    plot.add_argument(
        "--out", type=Path, metavar="PICTURE", help="default: curves.png in the first folder"
    )
    plot.set_defaults(run=run_plot)
    _add_compare(runs)


def _add_compare(runs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = runs.add_parser(
        "compare",
        help="tell whether one run is really better than another",
        description=(
            "Difference B - A of two runs that `segtrain eval` has scored on the same images, with "
            "95 % intervals: paired bootstrap over the images."
        ),
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name in "ab":
        parser.add_argument(
            name, type=Path, metavar=name.upper(), help="run folder, or result of eval --out"
        )
    parser.add_argument("--split", metavar="NAME", help="where a run has several")
    parser.add_argument(
        "--samples", type=int, default=10_000, metavar="N", help="drawings (default: 10000)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument(
        "--size-statistic",
        choices=("component", "image"),
        default="component",
        help="area that ranks small, medium and large classes (default: component)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run_compare)


def run_compare(args: argparse.Namespace) -> int:
    """Run `runs compare`.

    Args:
        args: Parsed arguments.

    Returns:
        Exit code 0, whoever is better.

    Raises:
        ValueError: For anything the user can correct.
    """
    from segtrain.evaluation.compare import compare
    from segtrain.files import plain

    result = compare(
        args.a,
        args.b,
        split=args.split,
        samples=args.samples,
        seed=args.seed,
        statistic=args.size_statistic,
    )
    print(json.dumps(plain(result.as_dict()), indent=2) if args.json else result.text())
    return 0


def run_plot(args: argparse.Namespace) -> int:
    """Run `runs plot`.

    Args:
        args: Parsed arguments.

    Returns:
        Exit code 0.

    Raises:
        ValueError: For anything the user can correct.
    """
    path = args.out or args.runs[0] / "curves.png"
    for line in draw_curves(args.runs, path):
        print(line)
    print(f"wrote {path}")
    return 0


def draw_curves(runs: Sequence[Path], path: Path) -> list[str]:
    """Draw training loss and mIoU against the number of updates.

    Args:
        runs: Folders of runs.
        path: The picture; its ending names the format, PNG, SVG or PDF for example.

    Returns:
        A line for each run: its best score and its last one.

    Raises:
        UserError: If a folder is no run, a run has nothing to draw yet, or no picture can have
            this ending.
    """
    from matplotlib.figure import Figure

    curves = {run: read_curves(run) for run in runs}
    figure = Figure(figsize=(11, 4), layout="constrained")
    loss, score = figure.subplots(1, 2)
    for run, drawn in curves.items():
        loss.plot(*_axes_of(drawn["loss"]), label=str(run))
        steps, scores = _axes_of(drawn["miou"])
        score.plot(steps, [100 * value for value in scores], "o-", label=str(run))
    loss.set(title="training loss", xlabel="updates", yscale="log")
    score.set(title="mIoU of the validation images, %", xlabel="updates", ylim=(0, 100))
    for axes in (loss, score):
        axes.grid(alpha=0.3)
        axes.legend()
    ending = path.suffix[1:].lower()
    known = figure.canvas.get_supported_filetypes()
    if ending not in known:
        raise UserError(f"{path}: no picture has this ending; use one of {', '.join(known)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120, format=ending)
    return [_summary(run, drawn["miou"]) for run, drawn in curves.items()]


def read_curves(run: Path) -> dict[str, Points]:
    """What the journal of a run says about loss and score.

    Args:
        run: Its folder.

    Returns:
        "loss" and "miou" -> (updates, value) in order; what is not a number is left out.

    Raises:
        UserError: If it is no run, or nothing was written yet.
    """
    journal = run / JOURNAL_NAME
    if not journal.is_file():
        raise UserError(f"{run} is no run, it has no {JOURNAL_NAME}; name the output of a run")
    curves: dict[str, Points] = {name: [] for name in _DRAWN.values()}
    for record in read_journal(journal):
        name = _DRAWN.get(record["event"])
        if name and _is_number(record.get(name)):
            curves[name].append((record["step"], record[name]))
    if not any(curves.values()):
        raise UserError(
            f"{run} has no loss and no score to draw yet; wait, or lower train.log_every"
        )
    return curves


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _axes_of(points: Points) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _summary(run: Path, scores: Points) -> str:
    if not scores:
        return f"{run}: not evaluated yet"
    best_step, best = max(scores, key=lambda point: point[1])
    last_step, last = scores[-1]
    return (
        f"{run}: mIoU {100 * last:.2f} % after {last_step} updates, "
        f"best {100 * best:.2f} % after {best_step}"
    )
