"""Finding the records of two runs, and refusing what cannot be compared."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d2ctx.compare.ap import HEADLINE as AP_NAMES
from d2ctx.compare.ap import ApScorer
from d2ctx.compare.miou import HEADLINE as MIOU_NAMES
from d2ctx.compare.miou import MiouScorer
from d2ctx.compare.pq import HEADLINE as PQ_NAMES
from d2ctx.compare.pq import PqScorer
from d2ctx.errors import UserError
from d2ctx.evaluation import ap_records, pq_records, semantic_records
from d2ctx.evaluation.ap_records import ApRecord, read_detections
from d2ctx.evaluation.pq_records import PqRecord, read_segments
from d2ctx.evaluation.record_files import read_about, recorded_tasks
from d2ctx.evaluation.semantic_records import SemanticRecord, read_labels
from d2ctx.wording import first_of, plural

Record = ApRecord | PqRecord | SemanticRecord
Scorer = ApScorer | PqScorer | MiouScorer
# Kind of a record -> reader, scorer, how many of the scorer's names stand before the classes.
KINDS = {
    ap_records.KIND: (read_detections, ApScorer, len(AP_NAMES)),
    pq_records.KIND: (read_segments, PqScorer, len(PQ_NAMES)),
    semantic_records.KIND: (read_labels, MiouScorer, len(MIOU_NAMES)),
}
_INFERENCE = "inference"
_FEW_IMAGES = 30


@dataclass(frozen=True)
class Pair:
    """The records of one task.

    Attributes:
        task: Its name.
        paths: Files of A and of B.
        records: What they hold.
    """

    task: str
    paths: tuple[Path, Path]
    records: tuple[Record, Record]

    def scorers(self) -> tuple[Scorer, Scorer]:
        """What scores A and B."""
        make = KINDS[self.records[0].about["kind"]][1]
        return make(self.records[0]), make(self.records[1])

    @property
    def headline(self) -> int:
        """How many scores stand before those of the classes."""
        return KINDS[self.records[0].about["kind"]][2]

    def warnings(self) -> Iterator[str]:
        """What makes the comparison doubtful, a line each."""
        a, b = self.records
        if len(a.images) < _FEW_IMAGES:
            yield f"with {plural(len(a.images), 'image')} the intervals are too narrow"
        if a.same_as(b):
            yield f"A and B have the same {self.task} results in every image"


def find_pairs(
    a: Path, b: Path, *, dataset: str | None = None, tasks: Sequence[str] = ()
) -> list[Pair]:
    """The tasks that both runs were evaluated on.

    Args:
        a: Output folder of a run, or the folder of one data set in it.
        b: The same of the other.
        dataset: Which data set, where a run has several.
        tasks: Which tasks; none are all that both have.

    Returns:
        A pair for each task.

    Raises:
        UserError: If records are missing or damaged, or not of the same images and ground truth.
    """
    folders = _folders(a, b, dataset)
    found = [recorded_tasks(folder) for folder in folders]
    shared = [task for task in found[0] if task in found[1]]
    for task in tasks or shared:
        for folder, there in zip(folders, found, strict=True):
            if task not in there:
                raise UserError(
                    f"{folder} has no records of {task}, but of {', '.join(there)}; "
                    "name one that both have, or evaluate the run again"
                )
    if not shared:
        raise UserError(
            f"{folders[0]} has records of {', '.join(found[0])}, {folders[1]} of "
            f"{', '.join(found[1])}: none in common; evaluate both with the same tasks"
        )
    return [_pair(task, (found[0][task], found[1][task])) for task in tasks or shared]


def _folders(a: Path, b: Path, dataset: str | None) -> tuple[Path, Path]:
    both = [_by_dataset(path) for path in (a, b)]
    if dataset is None:
        names = [name for name in both[0] if name in both[1]]
        if not names:
            raise UserError(
                f"{a} was evaluated on {', '.join(both[0])}, {b} on {', '.join(both[1])}; "
                "only results on the same data set can be compared"
            )
        if len(names) > 1:
            raise UserError(
                f"{a} and {b} share several data sets; add --dataset, one of {', '.join(names)}"
            )
        dataset = names[0]
    for path, there in zip((a, b), both, strict=True):
        if dataset not in there:
            raise UserError(
                f"{path} has no records of {dataset}, but of {', '.join(there)}; name one of them, "
                "or evaluate the run on it"
            )
    return both[0][dataset], both[1][dataset]


def _by_dataset(path: Path) -> dict[str, Path]:
    """Data set -> folder with its records."""
    if not path.is_dir():
        raise UserError(f"{path} is no folder; give the output folder of an evaluated run")
    folders = [path, *sorted((path / _INFERENCE).glob("*"))]
    found = {folder.name: folder for folder in folders if recorded_tasks(folder)}
    if not found:
        raise UserError(
            f"{path} has no records of images; evaluate the run again, which writes them: "
            "projects/train_net.py --config-file "
            f"{path / 'config.yaml'} --eval-only --resume"
        )
    return found


def _pair(task: str, paths: tuple[Path, Path]) -> Pair:
    about = [read_about(path) for path in paths]
    _check_about(paths, about)
    read = KINDS[about[0]["kind"]][0]
    records = read(paths[0]), read(paths[1])
    _check_images(paths, records)
    return Pair(task, paths, records)


def _check_about(paths: tuple[Path, Path], about: list[dict[str, Any]]) -> None:
    a, b = about
    if a["kind"] not in KINDS:
        raise UserError(f"{paths[0]} holds {a['kind']}, known: {', '.join(KINDS)}; update d2ctx")
    for key in ("kind", "dataset", "task"):
        if a[key] != b[key]:
            raise UserError(
                f"{paths[0]} has {key} {a[key]}, {paths[1]} {b[key]}; only results on the same "
                "data set and task can be compared"
            )
    if a["classes"] != b["classes"]:
        one, other = (_classes(x, y) for x, y in ((a, b), (b, a)))
        raise UserError(
            f"{paths[0]} has {one}, {paths[1]} {other}; only results on the same classes can be "
            "compared"
        )


def _classes(one: dict[str, Any], other: dict[str, Any]) -> str:
    only = [name for name in one["classes"] if name not in other["classes"]]
    named = f" ({first_of(only)})" if only else ""
    return f"{plural(len(one['classes']), 'class')}{named}"


def _check_images(paths: tuple[Path, Path], records: tuple[Record, Record]) -> None:
    a, b = records
    if a.images != b.images:
        only = sorted(set(a.images) ^ set(b.images)) or ["their order"]
        raise UserError(
            f"{paths[0]} has {plural(len(a.images), 'image')}, {paths[1]} {len(b.images)}, "
            f"they differ in {first_of(only)}; evaluate both on the same images"
        )
    if len(a.images) < 2:
        raise UserError(f"{paths[0]} has one image; two at least are needed to tell chance")
    differs = np.flatnonzero(a.digests != b.digests)
    if differs.size:
        names = [a.images[number] for number in differs]
        raise UserError(
            f"{paths[0]} and {paths[1]} were scored against another ground truth in "
            f"{first_of(names)}; evaluate both with the same annotations"
        )
