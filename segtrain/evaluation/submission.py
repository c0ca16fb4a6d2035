"""`submit cityscapes`: predict, check, pack, and score by the official code where possible."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segtrain.data.datasets import cityscapes
from segtrain.data.reading import read_labels, read_stored
from segtrain.errors import UserError
from segtrain.evaluation import cityscapes_official
from segtrain.evaluation.confusion import ConfusionMatrix
from segtrain.evaluation.trained import Trained
from segtrain.submit import (
    image_sizes,
    key_of,
    official_scores,
    violations,
    write_archive,
    write_label_ids,
)
from segtrain.wording import plural

_AGREE = 1e-9  # both sides divide the same integers


@dataclass(frozen=True)
class Submission:
    """What was written.

    Attributes:
        folder: Of the PNGs.
        archive: What to send; None where the server would refuse it.
        images: How many.
        violations: What the server would refuse.
        miou: By our confusion matrix, from 0 to 1; None without ground truth.
        official: Results of cityscapesScripts; None without ground truth.
    """

    folder: Path
    archive: Path | None
    images: int
    violations: tuple[str, ...]
    miou: float | None = None
    official: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        official = self.official or {}
        return {
            "folder": self.folder,
            "archive": self.archive,
            "images": self.images,
            "violations": list(self.violations),
            "miou": self.miou,
            "official_miou": official.get("averageScoreClasses"),
            "official_iiou": official.get("averageScoreInstClasses"),
            "official_iou": official.get("classScores"),
            "evaluator": f"cityscapesScripts {cityscapes_official.version()}" if official else None,
        }

    def text(self) -> str:
        """What to print."""
        lines = list(self.violations)
        if self.archive is None:
            lines.append(f"{plural(len(lines), 'violation')}; no archive was written")
        else:
            lines.append(f"{self.archive}: valid, {plural(self.images, 'image')}")
        if self.official is not None and self.miou is not None:
            lines.append(
                f"mIoU {100 * self.official['averageScoreClasses']:.2f} by cityscapesScripts "
                f"{cityscapes_official.version()}, {100 * self.miou:.2f} by segtrain"
            )
        return "\n".join(lines)


def submit_cityscapes(
    trained: Trained,
    split: str,
    folder: Path,
    *,
    precision: str = "fp32",
    progress: Callable[[int, int], None] | None = None,
) -> Submission:
    """Predict a split for the server of Cityscapes.

    Args:
        trained: A model of the 19 classes, with the data set.
        split: "test", "val" or "train".
        folder: For the PNGs: absent or empty; the archive lies beside it.
        precision: "fp32" or "bf16".
        progress: Called with images done and all images.

    Returns:
        What was written, and its scores where ground truth exists.

    Raises:
        UserError: If the data set is another one, or the folder holds files.
    """
    if trained.layout.name != "cityscapes":
        raise UserError(
            f"the model was trained on {trained.layout.name}; add data.dataset=cityscapes "
            "data.root=DIR where its classes are those of Cityscapes"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty; name a new folder, old files would be sent too")
    samples = trained.layout.samples(split)
    sizes = image_sizes(samples)
    folder.mkdir(parents=True, exist_ok=True)
    done = iter(range(1, len(samples) + 1))
    tick = None if progress is None else lambda: progress(next(done), len(samples))
    inferencer = trained.inferencer(precision=precision)
    pictures = write_label_ids(inferencer, samples, folder, progress=tick)
    found = tuple(violations(folder, sizes))
    archive = None if found else folder.with_name(f"{folder.name}.zip")
    if archive is not None:
        write_archive(pictures, archive)
    official = None if found else official_scores(samples, pictures)
    miou = None if official is None else _own_miou(trained, samples, pictures)
    if official is not None and abs(official["averageScoreClasses"] - miou) > _AGREE:
        raise RuntimeError(
            f"cityscapesScripts finds mIoU {official['averageScoreClasses']}, segtrain {miou}; "
            "this is an error of one of them, please report it"
        )
    return Submission(folder, archive, len(samples), found, miou, official)


def _own_miou(trained: Trained, samples: list, pictures: dict[str, Path]) -> float:
    """From the files as they were written, so that what is sent is what is scored."""
    matrix = ConfusionMatrix(len(trained.layout.classes))
    encoding = cityscapes.label_ids_encoding()
    for sample in samples:
        written = encoding.decode(read_stored(pictures[key_of(sample.image)]))
        matrix.update(written, read_labels(trained.layout, sample), name=str(sample.label))
    return matrix.scores().miou
