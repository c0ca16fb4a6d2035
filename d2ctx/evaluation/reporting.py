"""Several evaluators of one data set, and the file that says what they found and how."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluators
from detectron2.utils import comm

from d2ctx.files import write_json


@dataclass(frozen=True)
class TaskReport:
    """What one evaluation found.

    Attributes:
        evaluator: Program that computed the numbers.
        version: Its version.
        images: How many images were evaluated.
        classes: Class names.
        values: Name -> number, in percent.
        per_class: Class name -> name -> number.
        notes: What a reader must know.
    """

    evaluator: str
    version: str
    images: int
    classes: list[str]
    values: dict[str, float]
    per_class: dict[str, dict[str, float]]
    notes: list[str] = field(default_factory=list)


class Reporting(Protocol):
    """An evaluator that keeps what it found."""

    reports: dict[str, TaskReport]


class ReportingEvaluators(DatasetEvaluators):
    """Evaluators of one data set; `results.json` in their folder says what they found.

    Args:
        evaluators: Each keeps `reports`, task -> `TaskReport`, after its evaluation.
        dataset_name: The data set.
        folder: Where `results.json` goes.
    """

    def __init__(self, evaluators: Sequence[Reporting], *, dataset_name: str, folder: Path):
        super().__init__(list(evaluators))
        self.dataset_name = dataset_name
        self.folder = folder

    def evaluate(self) -> dict[str, Any]:
        """Evaluate; write the report on the main process.

        Returns:
            Task -> name -> number, as Detectron2's trainer expects it.
        """
        results = super().evaluate()
        if comm.is_main_process():
            tasks = {t: asdict(r) for e in self._evaluators for t, r in e.reports.items()}
            split = MetadataCatalog.get(self.dataset_name).get("split")
            content = {"dataset": self.dataset_name, "split": split, "tasks": tasks}
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "results.json", content)
        return results


def flat(report: TaskReport, *, name: str) -> dict[str, float]:
    """The values, and one value of each class as `name-class`, as Detectron2 reports them."""
    return report.values | {f"{name}-{c}": v[name] for c, v in report.per_class.items()}
