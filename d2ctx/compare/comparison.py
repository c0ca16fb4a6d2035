"""What a comparison found: numbers, a table, and a sentence."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path
from typing import Any

from tabulate import tabulate

from d2ctx.compare.paired import LEVEL, Difference, paired_bootstrap
from d2ctx.compare.sides import find_pairs
from d2ctx.errors import UserError
from d2ctx.wording import plural

SAMPLES = (100, 100_000)  # an interval needs its tails, and memory has an end
METHOD = (
    "paired bootstrap over images: drawn with replacement, the same for A and B; scored as a data "
    "set is, average precision over the curve of all drawn detections; percentiles"
)
# What the first score of a task is called.
_CALLED = {
    "bbox": "box AP",
    "segm": "mask AP",
    "panoptic_seg": "PQ",
    "sem_seg": "mIoU of the semantic branch",
}


@dataclass(frozen=True, kw_only=True)
class TaskComparison:
    """Two runs on the same images, one task.

    Attributes:
        task: Such as "bbox".
        paths: Files of the records of A and of B.
        dataset: Its name.
        images: N.
        scores: Name -> difference; the first decides.
        classes: Class name -> difference.
        warnings: What makes the comparison doubtful, a line each.
    """

    task: str
    paths: tuple[Path, Path]
    dataset: str
    images: int
    scores: dict[str, Difference]
    classes: dict[str, Difference]
    warnings: tuple[str, ...]

    @property
    def main(self) -> Difference:
        """The difference that decides."""
        return next(iter(self.scores.values()))

    def verdict(self) -> str:
        """One sentence, in points of percent."""
        gain, called = self.main, _CALLED.get(self.task, self.task)
        if not gain.is_known:
            return f"{called}: nothing can be told, nothing is annotated"
        chance = f"B is better with probability {gain.b_is_better:.3f}"
        if not gain.is_told:
            return (
                f"{called}: no difference can be told: B - A is {_signed(gain.difference)} "
                f"[{_signed(gain.low)}, {_signed(gain.high)}] points; {chance}"
            )
        better, low, high = (
            ("B", gain.low, gain.high) if gain.low > 0 else ("A", -gain.high, -gain.low)
        )
        return (
            f"{called}: {better} is better by {_percent(abs(gain.difference))} "
            f"[{_percent(low)}, {_percent(high)}] points; {chance}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values in full precision, scores from 0 to 1."""
        return {
            "verdict": self.verdict(),
            "dataset": self.dataset,
            "images": self.images,
            "records": dict(zip("ab", map(str, self.paths), strict=True)),
            "warnings": list(self.warnings),
            "scores": {name: _plain(gain) for name, gain in self.scores.items()},
            "classes": {name: _plain(gain) for name, gain in self.classes.items()},
        }

    def text(self) -> str:
        """A table in percent, what stands behind the marks, and the sentence."""
        head = ("", "A", "B", "B - A", f"{LEVEL:.0%} interval", "P(B > A)", "")
        rows = [_row(name, gain) for name, gain in {**self.scores, **self.classes}.items()]
        table = tabulate(
            rows, head, disable_numparse=True, colalign=("left", *["right"] * 5, "left")
        )
        known = [gain for gain in self.classes.values() if gain.is_known]
        told, chance = sum(gain.is_told for gain in known), (1 - LEVEL) * len(known)
        note = (
            f"* zero lies outside: so in {told} of {plural(len(known), 'class')}, where chance "
            f"alone gives about {chance:.1f}"
        )
        lines = (line.rstrip() for line in table.splitlines())
        return "\n".join(
            [f"{self.task} on {self.dataset}", *lines, note, *self.warnings, self.verdict()]
        )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two runs on the same images.

    Attributes:
        runs: What was given for A and for B.
        samples: How often images were drawn.
        seed: Of the drawing.
        tasks: What was compared.
    """

    runs: tuple[Path, Path]
    samples: int
    seed: int
    tasks: tuple[TaskComparison, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values in full precision, scores from 0 to 1."""
        return {
            "method": METHOD,
            "level": LEVEL,
            "samples": self.samples,
            "seed": self.seed,
            **dict(zip("ab", map(str, self.runs), strict=True)),
            "tasks": {task.task: task.as_dict() for task in self.tasks},
        }

    def text(self) -> str:
        """The tables and sentences, and what they do not say."""
        sides = [f"{side}: {path}" for side, path in zip("AB", self.runs, strict=True)]
        images = plural(self.tasks[0].images, "image")
        notes = [
            f"{images} drawn {self.samples} times, seed {self.seed}; the same for A and B",
            "the intervals are about other images, not about training once more",
        ]
        return "\n\n".join(["\n".join(sides + notes), *(task.text() for task in self.tasks)])


def compare(
    a: Path,
    b: Path,
    *,
    dataset: str | None = None,
    tasks: Sequence[str] = (),
    samples: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Compare two runs that were evaluated on the same images.

    Args:
        a: Output folder of a run, or the folder of one data set in it.
        b: The same of the other.
        dataset: Which data set, where a run has several.
        tasks: Which tasks; none are all that both have.
        samples: How often images are drawn, 100 to 100,000.
        seed: Of the drawing.

    Returns:
        The differences B - A.

    Raises:
        UserError: If records are missing or damaged, or not of the same images and ground truth.
    """
    if not SAMPLES[0] <= samples <= SAMPLES[1]:
        raise UserError(f"--samples must be in {SAMPLES[0]}..{SAMPLES[1]}, got {samples}")
    if seed < 0:
        raise UserError(f"--seed must not be negative, got {seed}")
    pairs = find_pairs(a, b, dataset=dataset, tasks=tasks)
    found = []
    for pair in pairs:
        scorers, record = pair.scorers(), pair.records[0]
        gains = paired_bootstrap(
            [scorer.scores for scorer in scorers], len(record.images), samples=samples, seed=seed
        )
        named, cut = list(zip(scorers[0].names, gains, strict=True)), pair.headline
        found.append(
            TaskComparison(
                task=pair.task,
                paths=pair.paths,
                dataset=record.about["dataset"],
                images=len(record.images),
                scores=dict(named[:cut]),
                classes=dict(named[cut:]),
                warnings=tuple(pair.warnings()),
            )
        )
    return Comparison(runs=(a, b), samples=samples, seed=seed, tasks=tuple(found))


def _plain(gain: Difference) -> dict[str, float | None]:
    values = {**asdict(gain), "difference": gain.difference}
    return {name: None if isnan(value) else value for name, value in values.items()}


def _row(name: str, gain: Difference) -> list[str]:
    interval = f"[{_signed(gain.low)}, {_signed(gain.high)}]" if gain.is_known else "-"
    better = f"{gain.b_is_better:.3f}" if gain.is_known else "-"
    numbers = [_percent(gain.a), _percent(gain.b), _signed(gain.difference)]
    return [name, *numbers, interval, better, "*" if gain.is_told else ""]


def _percent(value: float) -> str:
    return "-" if isnan(value) else f"{100 * value:.2f}"


def _signed(value: float) -> str:
    return "-" if isnan(value) else f"{100 * value:+.2f}"
