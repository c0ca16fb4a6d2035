"""What an evaluation found, as a table to read and as a dict to keep."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any

from segtrain import __version__
from segtrain.evaluation import boundary_iou, size_groups
from segtrain.evaluation.confusion import Scores, mean_of_known


@dataclass(frozen=True, kw_only=True)
class Report:
    """Scores of a split with all that they depend on.

    Attributes:
        dataset: Name of the data set, which says how labels are read.
        split: Which split.
        images: How many images.
        classes: Names.
        settings: Of the inference.
        scores: From the confusion matrix.
        statistic: Key of `size_groups.STATISTICS`; None where sizes were not measured.
        groups: Small, medium and large classes.
        boundary: Boundary IoU of each class; None where it was not measured.
    """

    dataset: str
    split: str
    images: int
    classes: tuple[str, ...]
    settings: dict[str, Any]
    scores: Scores
    statistic: str | None = None
    groups: tuple[size_groups.SizeGroup, ...] = ()
    boundary: tuple[float, ...] | None = None

    @property
    def boundary_miou(self) -> float:
        """Mean boundary IoU of the classes that have one; NaN where it was not measured."""
        return mean_of_known(self.boundary or ())

    def as_dict(self) -> dict[str, Any]:
        """Plain values in full precision, scores from 0 to 1.

        Returns:
            What a result file holds.
        """
        scores = self.scores
        result = {
            "miou": scores.miou,
            "pixel_accuracy": scores.pixel_accuracy,
            "mean_accuracy": scores.mean_accuracy,
            "fw_iou": scores.fw_iou,
            "dataset": self.dataset,
            "split": self.split,
            "images": self.images,
            "pixels": scores.num_pixels,
            "void_pixels": scores.num_void,
            "evaluator": f"segtrain {__version__}",
            "inference": self.settings,
            "classes": list(self.classes),
            "iou": dict(zip(self.classes, scores.iou, strict=True)),
            "accuracy": dict(zip(self.classes, scores.accuracy, strict=True)),
        }
        return result | self._details()

    def _details(self) -> dict[str, Any]:
        details: dict[str, Any] = {}
        if self.statistic is not None:
            statistic = size_groups.STATISTICS[self.statistic]
            details["size_groups"] = {
                "definition": size_groups.DEFINITION.format(statistic=statistic),
                **{
                    group.name: {
                        "miou": group.miou,
                        "classes": [self.classes[k] for k in group.classes],
                    }
                    for group in self.groups
                },
            }
        if self.boundary is not None:
            details["boundary"] = {
                "definition": boundary_iou.DEFINITION,
                "miou": self.boundary_miou,
                "iou": dict(zip(self.classes, self.boundary, strict=True)),
            }
        return details

    def table(self) -> str:
        """The scores in percent, to print.

        Returns:
            One line per class, the means, and what they depend on.
        """
        boundary = self.boundary or (float("nan"),) * len(self.classes)
        columns = zip(self.classes, self.scores.iou, self.scores.accuracy, boundary, strict=True)
        rows = [[name, *map(percent, values)] for name, *values in columns]
        means = (self.scores.miou, self.scores.mean_accuracy, self.boundary_miou)
        rows.append(["mean", *map(percent, means)])
        lines = aligned([["class", "IoU", "accuracy", "boundary IoU"], *rows])
        lines.append(
            f"pixel accuracy {percent(self.scores.pixel_accuracy)}, "
            f"frequency-weighted IoU {percent(self.scores.fw_iou)}"
        )
        if self.groups:
            parts = (f"{g.name} {percent(g.miou)} ({len(g.classes)})" for g in self.groups)
            lines.append(f"mIoU by class size: {', '.join(parts)}")
        return "\n".join([*lines, self._conditions()])

    def _conditions(self) -> str:
        settings = ", ".join(f"{k} {v}" for k, v in self.settings.items() if v is not None)
        total = self.scores.num_pixels + self.scores.num_void
        void = self.scores.num_void / total if total else 0.0
        return (
            f"{self.dataset} {self.split}: {self.images} images, {void:.2%} of the pixels void; "
            f"{settings}"
        )


def percent(value: float) -> str:
    """A score from 0 to 1 in percent, `-` for NaN."""
    return "-" if isnan(value) else f"{100 * value:.2f}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns, the first to the left and the others to the right, and a line below the head.

    Args:
        rows: The head and the others, all of the same length.

    Returns:
        The lines of a table.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
