"""Everything that can be wrong with the files of a data set, before a run meets it.

Nothing is repaired here: a finding says what was expected, what came, which files, and the fix.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segtrain.config.data import DataConfig
from segtrain.data.conventions import Evidence, Guess, guesses, suspicions
from segtrain.data.datasets import Layout, Sample, build_layout
from segtrain.data.datasets.layout import IMAGE_SUFFIXES, all_below, files_below
from segtrain.data.labels import IGNORE_INDEX, ValueEncoding, ranges
from segtrain.data.scan import FileFacts, scan
from segtrain.errors import UserError
from segtrain.wording import first_of, plural

Progress = Callable[[int, int], None]
_LOSSY = (".jpg", ".jpeg")


@dataclass(frozen=True)
class Finding:
    """One kind of problem.

    Attributes:
        kind: "unreadable", "size", "lossy", "channels", "values", "unpaired", "suspicious" or
            "overlap".
        text: One line.
        files: Every file that has it.
    """

    kind: str
    text: str
    files: tuple[str, ...] = ()


@dataclass
class SplitReport:
    """What was found in a split.

    Attributes:
        split: Name.
        images: Number of samples.
        errors: Problems that stop a run.
        notes: Worth a line.
        guesses: Conventions that the labels look like.
        pixels: Pixels of each class, where labels were decoded and known.
        presence: Images that hold each class.
        ignored: Pixels that are ignored.
        sizes: (width, height) -> images.
    """

    split: str
    images: int
    errors: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    guesses: list[Guess] = field(default_factory=list)
    pixels: list[int] = field(default_factory=list)
    presence: list[int] = field(default_factory=list)
    ignored: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)

    def as_json(self) -> dict[str, Any]:
        """The report as plain types.

        Returns:
            A dict for `json.dump`.
        """
        return {
            "split": self.split,
            "images": self.images,
            "errors": [
                {"kind": e.kind, "text": e.text, "files": list(e.files)} for e in self.errors
            ],
            "notes": self.notes,
            "guesses": [{"text": g.text, "yaml": g.yaml} for g in self.guesses],
        }


def check_layout(
    layout: Layout,
    splits: Sequence[str],
    *,
    decode: bool = True,
    progress: Progress | None = None,
) -> list[SplitReport]:
    """Check the files of some splits.

    Args:
        layout: The data set.
        splits: Names of splits.
        decode: True decodes every file and counts label values; False reads headers only.
        progress: Called with (done, total) of the split at hand.

    Returns:
        A report per split.

    Raises:
        UserError: If a split is missing or empty.
    """
    samples = {split: layout.samples(split) for split in splits}
    reports = [
        check_samples(layout, split, part, decode=decode, progress=progress)
        for split, part in samples.items()
    ]
    seen: dict[Path, str] = {}
    for report in reports:
        _overlap(report, samples[report.split], seen)
    return reports


def check_config(config: DataConfig, *, progress: Progress | None = None) -> list[SplitReport]:
    """Check the training and validation split as `data.check` says; raises on errors.

    Args:
        config: The section `data`.
        progress: Called with (done, total) of the split at hand.

    Returns:
        The reports, without errors; none with `check: off`.

    Raises:
        UserError: If anything would stop a run, one line per kind of problem.
    """
    if config.check == "off":
        return []
    splits = (config.train_split, config.val_split)
    decode = config.check == "full"
    reports = check_layout(build_layout(config), splits, decode=decode, progress=progress)
    raise_errors(reports)
    return reports


def raise_errors(reports: Iterable[SplitReport]) -> None:
    """Raise if any report has an error.

    Args:
        reports: Of `check_layout`.

    Raises:
        UserError: With all errors, one per line.
    """
    lines = []
    for report in reports:
        likely = f"; likely: {report.guesses[0].text}" if report.guesses else ""
        labels = ("values", "channels")
        lines += [
            f"data, {report.split}: {e.text}{likely if e.kind in labels else ''}"
            for e in report.errors
        ]
    if len(lines) == 1:
        raise UserError(f"{lines[0]}; see: segtrain data check")
    if lines:
        head = f"{plural(len(lines), 'thing')} to mend in the data, see: segtrain data check"
        raise UserError("\n".join([head, *(f"  {line}" for line in lines)]))


def check_samples(
    layout: Layout,
    split: str,
    samples: Sequence[Sample],
    *,
    decode: bool = True,
    progress: Progress | None = None,
) -> SplitReport:
    """Check the files of some samples.

    Args:
        layout: The data set.
        split: Name for the report.
        samples: Which samples.
        decode: As in `check_layout`.
        progress: Called with (done, total).

    Returns:
        The report.
    """
    facts = scan(layout, samples, decode=decode, progress=progress)
    report = SplitReport(split, len(samples))
    report.sizes = Counter(f.image_size for f in facts if f.image_size)
    _unreadable(report, facts)
    _sizes(report, facts)
    _lossy(report, facts)
    _channels(report, layout, facts)
    _values(report, layout, facts)
    _unpaired(report, layout, samples)
    _unknown(report, layout, samples)
    if decode:
        _count(report, layout, facts)
    return report


def _unreadable(report: SplitReport, facts: Sequence[FileFacts]) -> None:
    broken = [f for f in facts if f.problems]
    if broken:
        problems = [problem for f in broken for problem in f.problems]
        text = f"{plural(len(problems), 'file')} missing or unreadable: {first_of(problems)}"
        files = tuple(str(f.sample.label or f.sample.image) for f in broken)
        report.errors.append(Finding("unreadable", text, files))


def _sizes(report: SplitReport, facts: Sequence[FileFacts]) -> None:
    odd = [f for f in facts if f.label_size and f.image_size and f.label_size != f.image_size]
    if odd:
        shown = [f"{f.sample.label}: {_by(f.label_size)} for {_by(f.image_size)}" for f in odd]
        text = f"{plural(len(odd), 'label map')} of another size than the image: {first_of(shown)}"
        report.errors.append(_finding("size", f"{text}; write them at the image's size", odd))


def _lossy(report: SplitReport, facts: Sequence[FileFacts]) -> None:
    odd = [f for f in facts if f.sample.label and f.sample.label.suffix.lower() in _LOSSY]
    if odd:
        text = f"{plural(len(odd), 'label map')} saved as JPEG, which changes values: {_names(odd)}"
        report.errors.append(_finding("lossy", f"{text}; write them again as PNG", odd))


def _channels(report: SplitReport, layout: Layout, facts: Sequence[FileFacts]) -> None:
    wants = layout.encoding.colours
    odd = [f for f in facts if f.mode and f.colours != wants]
    if odd:
        modes = ", ".join(sorted({f.mode for f in odd}))
        wanted = "colours, as palette says," if wants else "one channel of class numbers"
        text = f"{plural(len(odd), 'label map')} of mode {modes}, expected {wanted}: {_names(odd)}"
        report.errors.append(_finding("channels", text, odd))
        report.guesses += guesses(_evidence(layout, odd))


def _values(report: SplitReport, layout: Layout, facts: Sequence[FileFacts]) -> None:
    """Values that the encoding lacks, or that fit another convention better."""
    fitting = [f for f in facts if f.values and f.colours == layout.encoding.colours]
    encoding = layout.encoding
    seen = _presence(fitting)
    foreign = set(seen) - set(encoding.table())
    odd = [f for f in fitting if foreign & set(f.values)]
    if odd:
        unknown = encoding.foreign_text(sorted(foreign))
        known = ""
        if isinstance(encoding, ValueEncoding):
            known = f"; known: {ranges([value for value, _ in encoding.classes])}"
        text = f"{unknown} in {len(odd)} of {plural(len(fitting), 'label map')}: {_names(odd)}"
        report.errors.append(_finding("values", text + known, odd))
        report.guesses += guesses(_evidence(layout, fitting))
        return
    for guess in suspicions(layout, seen):
        report.guesses.append(guess)
        if layout.name == "cityscapes":
            report.errors.append(_finding("suspicious", guess.text, fitting))
        else:
            report.notes.append(guess.text)


def _unpaired(report: SplitReport, layout: Layout, samples: Sequence[Sample]) -> None:
    if not layout.one_to_one:
        return
    used = {s.label for s in samples if s.label}
    top = {p.parents[len(Path(s.name).parts) - 1] for s in samples if (p := s.label)}
    suffixes = tuple({p.suffix.lower() for p in used})
    extra = [p for folder in sorted(top) for p in files_below(folder, suffixes) if p not in used]
    if extra:
        text = f"{plural(len(extra), 'label map')} without an image: {first_of(extra)}"
        files = tuple(map(str, extra))
        report.errors.append(Finding("unpaired", f"{text}; add the images or remove them", files))


def _unknown(report: SplitReport, layout: Layout, samples: Sequence[Sample]) -> None:
    """Files among the images that nobody will look at."""
    if not layout.one_to_one:
        return
    top = {s.image.parents[len(Path(s.name).parts) - 1] for s in samples}
    extra = [
        path
        for folder in sorted(top)
        for path in sorted(all_below(folder))
        if not path.name.lower().endswith(IMAGE_SUFFIXES)
    ]
    if extra:
        text = f"{plural(len(extra), 'file')} of no known ending among the images"
        report.notes.append(f"{text}, not used: {first_of(extra)}")


def _count(report: SplitReport, layout: Layout, facts: Sequence[FileFacts]) -> None:
    """Pixels and images of each class, and what is odd about them."""
    table, num = layout.encoding.table(), len(layout.classes)
    report.pixels, report.presence = [0] * num, [0] * num
    empty = []
    for f in facts:
        classes: Counter[int] = Counter()
        for value, pixels in f.values.items():
            if f.colours == layout.encoding.colours and value in table:
                classes[table[value]] += pixels
        report.ignored += classes.pop(IGNORE_INDEX, 0)
        if f.values and not classes:
            empty.append(f)
        for k, pixels in classes.items():
            report.pixels[k] += pixels
            report.presence[k] += 1
    absent = [layout.classes.names[k] for k in range(num) if not report.presence[k]]
    if absent and any(f.sample.label for f in facts):
        report.notes.append(f"{plural(len(absent), 'class')} without a pixel: {first_of(absent)}")
    if empty:
        text = f"{plural(len(empty), 'label map')} with nothing but ignored pixels: {_names(empty)}"
        report.notes.append(text)


def _overlap(report: SplitReport, samples: Sequence[Sample], seen: dict[Path, str]) -> None:
    both = [s.image for s in samples if s.image in seen]
    if both:
        other = seen[both[0]]
        text = f"{plural(len(both), 'image')} in {other} as well: {first_of(both)}"
        report.errors.append(Finding("overlap", text, tuple(map(str, both))))
    seen.update({s.image: report.split for s in samples})


def _evidence(layout: Layout, facts: Sequence[FileFacts]) -> Evidence:
    return Evidence(
        values=_presence(facts),
        colours=facts[0].colours,
        num_classes=len(layout.classes),
        names=layout.classes.names,
    )


def _presence(facts: Iterable[FileFacts]) -> Counter[int]:
    return Counter(value for f in facts for value in f.values)


def _finding(kind: str, text: str, facts: Sequence[FileFacts]) -> Finding:
    return Finding(kind, text, tuple(str(f.sample.label) for f in facts))


def _names(facts: Sequence[FileFacts]) -> str:
    return first_of([f.sample.label for f in facts])


def _by(size: tuple[int, int] | None) -> str:
    return f"{size[0]}x{size[1]}" if size else "?"
