"""`segtrain runs compare`: is B really better than A, or were these images kind to it?"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segtrain.errors import UserError
from segtrain.evaluation.paired import LEVEL, Difference, paired_bootstrap
from segtrain.evaluation.per_image import ImageCounts, read_counts
from segtrain.evaluation.report import aligned, percent
from segtrain.evaluation.size_groups import DEFINITION, GROUPS, STATISTICS, size_groups
from segtrain.evaluation.trained import NAMES
from segtrain.train.checkpoint import FOLDER
from segtrain.wording import first_of, plural

SAMPLES = (100, 100_000)  # an interval needs its tails, and memory has an end
METHOD = (
    "paired bootstrap over images: drawn with replacement, the same for A and B; counts summed, "
    "then scored; percentiles"
)
_STEM = "per_image_"
_FEW_IMAGES = 30
_SHARED = ("dataset", "split", "classes")  # what both must say


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models on the same images.

    Attributes:
        paths: Files of the counts of A and of B.
        about: What each file says of itself.
        images: N.
        samples: How often images were drawn.
        seed: Of the drawing.
        statistic: What classes are ranked by.
        miou: The difference that decides.
        pixel_accuracy: That of the pixel accuracy.
        groups: Small, medium and large classes: their names and their mIoU.
        classes: IoU of each class.
        warnings: What makes the comparison doubtful or different from what was meant, a line each.
    """

    paths: tuple[Path, Path]
    about: tuple[Mapping[str, Any], Mapping[str, Any]]
    images: int
    samples: int
    seed: int
    statistic: str
    miou: Difference
    pixel_accuracy: Difference
    groups: dict[str, tuple[tuple[str, ...], Difference]]
    classes: dict[str, Difference]
    warnings: tuple[str, ...]

    def verdict(self) -> str:
        """One sentence in points of mIoU, percent."""
        gain = self.miou
        if np.isnan(gain.low):
            return "nothing can be told: no pixel counts"
        if not gain.is_told:
            return (
                f"no difference can be told: B - A is {_signed(gain.difference)} "
                f"[{_signed(gain.low)}, {_signed(gain.high)}] points of mIoU"
            )
        better, low, high = (
            ("B", gain.low, gain.high) if gain.low > 0 else ("A", -gain.high, -gain.low)
        )
        return (
            f"{better} is better by {percent(abs(gain.difference))} "
            f"[{percent(low)}, {percent(high)}] points of mIoU"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values in full precision, scores from 0 to 1."""
        return {
            "verdict": self.verdict(),
            "method": METHOD,
            "level": LEVEL,
            "images": self.images,
            "samples": self.samples,
            "seed": self.seed,
            "warnings": list(self.warnings),
            **{
                side: {"counts": path, **about}
                for side, path, about in zip("ab", self.paths, self.about, strict=True)
            },
            "miou": _plain(self.miou),
            "pixel_accuracy": _plain(self.pixel_accuracy),
            "size_groups": {
                "definition": DEFINITION.format(statistic=STATISTICS[self.statistic]),
                **{
                    name: {**_plain(gain), "classes": list(members)}
                    for name, (members, gain) in self.groups.items()
                },
            },
            "iou": {name: _plain(gain) for name, gain in self.classes.items()},
        }

    def text(self) -> str:
        """A table in percent, the sentence, and what it does not say."""
        rows = [("mIoU", self.miou), ("pixel accuracy", self.pixel_accuracy)]
        rows += [
            (f"mIoU {name} ({len(members)})", gain) for name, (members, gain) in self.groups.items()
        ]
        rows += list(self.classes.items())
        head = ("", "A", "B", "B - A", f"{LEVEL:.0%} interval", "sign", "")
        sides = (f"{side}: {path}" for side, path in zip("AB", self.paths, strict=True))
        table = aligned([head, *(_row(name, gain) for name, gain in rows)])
        lines = (line.rstrip() for line in table)
        return "\n".join([*sides, *lines, *self._notes(), self.verdict()])

    def _notes(self) -> list[str]:
        told = [gain for gain in self.classes.values() if not np.isnan(gain.low)]
        chance = (1 - LEVEL) * len(told)
        notes = [
            f"* zero lies outside: so in {sum(gain.is_told for gain in told)} of "
            f"{plural(len(told), 'class')}, where chance alone gives about {chance:.1f}",
            f"sign: share of the samples that agree on which is better; "
            f"{plural(self.images, 'image')} drawn {self.samples} times, seed {self.seed}",
            "the intervals are about other images, not about training once more",
        ]
        return [*notes, *self.warnings]


def counts_name(split: str) -> str:
    """Name of the file of counts in the folder of a run.

    Args:
        split: Which split.

    Returns:
        The name.
    """
    return f"{_STEM}{split.replace('/', '_')}.npz"


def compare(
    a: Path,
    b: Path,
    *,
    split: str | None = None,
    samples: int = 10_000,
    seed: int = 0,
    statistic: str = "component",
) -> Comparison:
    """Compare two models that were scored on the same images.

    Args:
        a: Folder of a run, result of `segtrain eval --out`, or a file of counts.
        b: The same of the other.
        split: Which split, where a run has several.
        samples: How often images are drawn, 100 to 100,000.
        seed: Of the drawing.
        statistic: What classes are ranked by, a key of `size_groups.STATISTICS`.

    Returns:
        The differences B - A.

    Raises:
        UserError: If counts are missing or damaged, or not of the same images and labels.
    """
    if not SAMPLES[0] <= samples <= SAMPLES[1]:
        raise UserError(f"samples must be in {SAMPLES[0]}..{SAMPLES[1]}, got {samples}")
    if seed < 0:
        raise UserError(f"seed must not be negative, got {seed}")
    paths = find_counts(a, split), find_counts(b, split)
    sides = read_counts(paths[0]), read_counts(paths[1])
    _check_same(paths, sides)
    one = sides[0]
    # What groups are made of is the ground truth, the same on both sides.
    ranked = size_groups(one.class_sizes().statistic(statistic), (float("nan"),) * len(one.classes))
    members = [group.classes for group in ranked]
    miou, accuracy, *rest = paired_bootstrap(
        (one.right(), sides[1].right()),
        (one.union(), sides[1].union()),
        members,
        samples=samples,
        seed=seed,
    )
    names = [tuple(one.classes[k] for k in part) for part in members]
    return Comparison(
        paths=paths,
        about=(one.about, sides[1].about),
        images=len(one.images),
        samples=samples,
        seed=seed,
        statistic=statistic,
        miou=miou,
        pixel_accuracy=accuracy,
        groups=dict(zip(GROUPS, zip(names, rest[: len(GROUPS)], strict=True), strict=True)),
        classes=dict(zip(one.classes, rest[len(GROUPS) :], strict=True)),
        warnings=tuple(_warnings((a, b), paths, sides)),
    )


def find_counts(source: Path, split: str | None = None) -> Path:
    """The file of counts that was meant.

    Args:
        source: Folder of a run, result of `segtrain eval --out`, or a file of counts.
        split: Which split, where a run has several.

    Returns:
        A path; of a folder, one that exists.

    Raises:
        UserError: If a folder has no such file, or several.
    """
    if not source.is_dir():
        return source.with_suffix(".npz")
    found = sorted(source.glob(counts_name(split) if split else f"{_STEM}*.npz"))
    if not found:
        option = f" --split {split}" if split else ""
        raise UserError(
            f"{source} has no counts of every image; run: segtrain eval {source}{option}"
        )
    if len(found) > 1:
        names = ", ".join(path.stem.removeprefix(_STEM) for path in found)
        raise UserError(f"{source} has counts of several splits; add --split, one of {names}")
    return found[0]


def _check_same(paths: tuple[Path, Path], sides: tuple[ImageCounts, ImageCounts]) -> None:
    a, b = sides
    for key in _SHARED:
        if a.about[key] != b.about[key]:
            raise UserError(
                f"{paths[0]} has {_told(key, a, b)}, {paths[1]} {_told(key, b, a)}; "
                "only scores of the same images and classes can be compared"
            )
    if a.images != b.images:
        only = sorted(set(a.images) ^ set(b.images)) or ["their order"]
        raise UserError(
            f"{paths[0]} has {plural(len(a.images), 'image')}, {paths[1]} {len(b.images)}, "
            f"they differ in {first_of(only)}; evaluate both on the same images"
        )
    if len(a.images) < 2:
        raise UserError(f"{paths[0]} has one image; two at least are needed to tell chance")
    differs = (a.truth() != b.truth()).any(axis=1) | (a.void != b.void)
    if differs.any():
        names = [a.images[number] for number in np.flatnonzero(differs)]
        raise UserError(
            f"{paths[0]} and {paths[1]} were scored against other labels in {first_of(names)}; "
            "evaluate both with the same labels"
        )


def _warnings(
    sources: tuple[Path, Path], paths: tuple[Path, Path], sides: tuple[ImageCounts, ImageCounts]
) -> Iterator[str]:
    for name, source, path in zip("AB", sources, paths, strict=True):
        if source.is_dir() and (weights := _newer_weights(source, path)):
            yield f"{name}: {weights} is newer than the counts; run again: segtrain eval {source}"
    a, b = sides
    settings, others = a.about["inference"], b.about["inference"]
    changed = [
        f"{key} {settings.get(key)} and {others.get(key)}"
        for key in {**settings, **others}
        if settings.get(key) != others.get(key)
    ]
    if changed:
        yield f"the inference differs: {', '.join(changed)}"
    if len(a.images) < _FEW_IMAGES:
        yield f"with {plural(len(a.images), 'image')} the intervals are too narrow"
    if np.array_equal(a.cells, b.cells):
        yield "A and B have the same counts in every image"


def _newer_weights(run: Path, counts: Path) -> str | None:
    """The weights that `eval` takes, where they were written after the counts."""
    places = (run / FOLDER / f"{name}.safetensors" for name in NAMES)
    weights = next(filter(Path.is_file, places), None)
    newer = weights is not None and weights.stat().st_mtime > counts.stat().st_mtime
    return weights.name if newer else None


def _told(key: str, one: ImageCounts, other: ImageCounts) -> str:
    if key != "classes":
        return f"{key} {one.about[key]}"
    only = [name for name in one.classes if name not in other.classes]
    named = f" ({first_of(only)})" if only else ""
    return f"{plural(len(one.classes), 'class')}{named}"


def _plain(gain: Difference) -> dict[str, float]:
    return {
        "a": gain.a,
        "b": gain.b,
        "difference": gain.difference,
        "low": gain.low,
        "high": gain.high,
        "sign_probability": gain.sign_probability,
    }


def _row(name: str, gain: Difference) -> list[str]:
    known = not np.isnan(gain.low)
    return [
        name,
        percent(gain.a),
        percent(gain.b),
        _signed(gain.difference),
        f"[{_signed(gain.low)}, {_signed(gain.high)}]" if known else "-",
        percent(gain.sign_probability),
        "*" if gain.is_told else "",
    ]


def _signed(value: float) -> str:
    return "-" if np.isnan(value) else f"{100 * value:+.2f}"
