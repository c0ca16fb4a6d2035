"""docs/evidence.md and its plot, written from a result file, so that they cannot drift from it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segtrain.data.synthetic.tasks import TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE, NOTES, PLOT = "docs/evidence.md", "benchmarks/gym_parts/notes.md", "benchmarks/results"
COLORS = {"as expected": "#2a7f5f", "not shown": "#8a8a8a", "surprise": "#c2452d"}
HEAD = (
    "| experiment | method | twin | difference [{level}] | seeds | expected | verdict |",
    "|---|--:|--:|--:|--:|---|---|",
)
Experiment = Mapping[str, Any]


def write_evidence(source: Path, root: Path) -> tuple[Path, Path]:
    """Write the page and the plot.

    Args:
        source: A result file of `benchmarks.gym`.
        root: Root of the repository.

    Returns:
        Page and plot.
    """
    content = json.loads(source.read_text())
    plot = root / PLOT / f"{source.stem}.png"
    draw_plot(content["experiments"], plot, margin=content["metadata"]["margin"])
    page = root / PAGE
    notes = (root / NOTES).read_text()
    page.write_text(page_of(content, f"{PLOT}/{source.name}", f"../{PLOT}/{plot.name}", notes))
    return page, plot


def page_of(content: Mapping[str, Any], source: str, plot: str, notes: str) -> str:
    """The page.

    Args:
        content: Of the result file.
        source: Its path, as the page names it.
        plot: Path of the plot from the page.
        notes: What a person has written about it.

    Returns:
        Markdown.
    """
    about, experiments = content["metadata"], content["experiments"]
    first, *rest = notes.split("<!-- table -->")
    assert len(rest) == 1, "the notes say once where the table stands"
    return "\n".join(
        [
            first.rstrip(),
            "",
            *table_of(experiments, level=about["level"]),
            "",
            *tasks_table(),
            "",
            f"![Differences with their intervals]({plot})",
            "",
            *_source_lines(about, experiments, source),
            *_unfinished_lines(content.get("unfinished", [])),
            "",
            rest[0].strip(),
            "",
        ]
    )


def table_of(experiments: Sequence[Experiment], *, level: float) -> list[str]:
    """The table of results, in percent.

    Args:
        experiments: Of the result file.
        level: Of the intervals.

    Returns:
        Lines of Markdown.
    """
    lines = [HEAD[0].format(level=f"{level:.0%}"), HEAD[1]]
    for e in experiments:
        method, twin, difference, low, high = (
            f"{100 * e[name]:{form}}"
            for name, form in zip(
                ("method", "twin", "difference", "low", "high"),
                (".1f", ".1f", "+.1f", "+.1f", "+.1f"),
                strict=True,
            )
        )
        told = e["verdict"] if e["verdict"] != "surprise" else "**surprise**"
        lines.append(
            f"| {e['name']} | {method} | {twin} | {difference} [{low}, {high}] | "
            f"{len(e['seeds'])} | {e['expected']} | {told} |"
        )
    return lines


def tasks_table() -> list[str]:
    """What decides in each task, and how far nothing tells the answer."""
    lines = ["| task | what decides | blind radius, pixels |", "|---|---|--:|"]
    for name, task in TASKS.items():
        lines.append(f"| {name} | {task.about} | {task.reach:g} |")
    return lines


def _source_lines(
    about: Mapping[str, Any], experiments: Sequence[Experiment], source: str
) -> list[str]:
    count = {name: sum(e["verdict"] == name for e in experiments) for name in COLORS}
    seconds = sum(sum(e["seconds"]) * len(e["seeds"]) for e in experiments)
    told = ", ".join(f"{number} {name}" for name, number in count.items())
    return [
        f"Of {len(experiments)} experiments: {told}. `{about['command']}`, "
        f"{seconds / 60:.0f} core-minutes on {about['hardware']}, torch {about['torch']}, commit "
        f"{about['commit'][:7]}, {about['date'][:10]}; `{source}`.",
    ]


def _unfinished_lines(names: Sequence[str]) -> list[str]:
    return ["", f"Not all seeds had finished of: {', '.join(names)}."] if names else []


def draw_plot(experiments: Sequence[Experiment], path: Path, *, margin: float) -> None:
    """Differences, one row per experiment, with their intervals and the points of single seeds.

    Args:
        experiments: Of the result file.
        path: Where the picture goes.
        margin: Half width of the band in which both sides count as equal.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 0.9 + 0.3 * len(experiments)), layout="constrained")
    axes: Axes = figure.subplots()
    axes.axvspan(-100 * margin, 100 * margin, color="#eeeeee", zorder=0)
    axes.axvline(0.0, color="#555555", linewidth=0.8)
    for row, e in enumerate(experiments):
        color = COLORS[e["verdict"]]
        axes.plot([100 * e["low"], 100 * e["high"]], [row, row], color=color, linewidth=2.5)
        axes.plot([100 * d for d in e["by_seed"]], [row] * len(e["by_seed"]), "|", color=color)
        axes.plot(100 * e["difference"], row, "o", color=color, markersize=6)
    labels = [f"{e['name']}  ({e['expected']})" for e in experiments]
    axes.set_yticks(range(len(experiments)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("method - twin, points of mIoU (boundary: of Boundary IoU)")
    for name, color in COLORS.items():
        axes.plot([], [], "o", color=color, label=name)
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=110)
