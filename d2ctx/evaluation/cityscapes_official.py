"""cityscapesScripts' own evaluators, made to run on numpy 2 without touching the installation.

`np.in1d` is gone from numpy 2.4, and `np.count_nonzero` returns numpy integers that the scripts'
JSON writer refuses. Each evaluator is therefore executed as a private copy of its module, whose
`np` and `writeDict2JSON` are replaced: numpy, the installed modules and the current directory stay
as they are. Tested with 2.3.0; a test fails when upstream needs none of this any more.
"""

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from d2ctx.errors import UserError
from d2ctx.evaluation.panoptic_files import WORKERS, read_json, write_ids

PACKAGE = "cityscapesscripts"
INSTANCE = "evaluation.evalInstanceLevelSemanticLabeling"
PANOPTIC = "evaluation.evalPanopticSemanticLabeling"
PIXEL = "evaluation.evalPixelLevelSemanticLabeling"
PANOPTIC_CONVERTER = "preparation.createPanopticImgs"


class _NumpyWithIn1d:
    """numpy for one module: everything as it is, and `in1d`, which numpy 2.4 has no more."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def in1d(values: Any, allowed: Any, **options: Any) -> np.ndarray:
        return np.isin(np.ravel(values), allowed, **options)


def version() -> str:
    """The installed version of cityscapesScripts."""
    return metadata.version(PACKAGE)


def official(name: str) -> ModuleType:
    """A private copy of one of cityscapesScripts' modules, with the stand-ins in place.

    Args:
        name: Its name below `cityscapesscripts`.

    Returns:
        The module; it is not in `sys.modules`.

    Raises:
        UserError: If cityscapesScripts is not installed.
    """
    try:
        spec = importlib.util.find_spec(f"{PACKAGE}.{name}")
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.loader is None:
        raise UserError(
            "cityscapesScripts is not installed, whose code evaluates Cityscapes; install it "
            "with: pip install 'ctxseg[d2]'"
        )
    module = importlib.util.module_from_spec(spec)
    with _explained():
        spec.loader.exec_module(module)
    module.np = _NumpyWithIn1d()
    # Both files that the evaluators write are by-products: a cache, and a list of matches that
    # goes to the current directory.
    module.writeDict2JSON = lambda *_: None
    return module


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Keep the scripts quiet; where they would end the process, raise what they printed last."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), warnings.catch_warnings():
            # Means over classes that do not occur are NaN, which is what they should be.
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    except SystemExit:
        lines = output.getvalue().strip().splitlines() or ["no reason given"]
        raise UserError(f"cityscapesScripts: {lines[-1].removeprefix('ERROR: ')}") from None


def instance_ap(pairs: Mapping[Path, Path], *, predictions_root: Path) -> dict[str, Any]:
    """Average precision of instances.

    Args:
        pairs: `*_gtFine_instanceIds.png` -> text file of the image's predictions.
        predictions_root: Folder above all text files and masks.

    Returns:
        The script's averages: "allAp", "allAp50%" and "classes" -> "ap", "ap50%", as fractions;
        NaN where there is no ground truth.

    Raises:
        UserError: If a file is not as the script expects it.
    """
    module = official(INSTANCE)
    with TemporaryDirectory(prefix="cityscapes-") as folder, _explained():
        # Absent, hence made from the PNGs; the default lies in the installed package.
        module.args.gtInstancesFile = str(Path(folder, "absent.json"))
        module.args.predictionPath = str(predictions_root.resolve())
        module.args.JSONOutput, module.args.quiet, module.args.colorized = False, True, False
        truth = [str(path.resolve()) for path in pairs]
        predicted = [str(path.resolve()) for path in pairs.values()]
        return module.evaluateImgLists(predicted, truth, module.args)["averages"]


def pixel_scores(pairs: Mapping[Path, Path]) -> dict[str, Any]:
    """IoU and iIoU of pixels.

    Args:
        pairs: `*_gtFine_labelIds.png` -> PNG of predicted labelIds.

    Returns:
        The script's results, as fractions.

    Raises:
        UserError: If a file is not as the script expects it.
    """
    module = official(PIXEL)
    with _explained():
        module.args.JSONOutput, module.args.quiet = False, True
        truth, predicted = map(
            list, zip(*((str(t), str(p)) for t, p in pairs.items()), strict=True)
        )
        return module.evaluateImgLists(predicted, truth, module.args)


def panoptic_quality(
    *,
    truth: Mapping[str, Any],
    truth_root: Path,
    predicted: Mapping[str, Any],
    predicted_root: Path,
    workers: int = WORKERS,
) -> dict[str, Any]:
    """Panoptic quality by the official code, in threads instead of forked processes.

    Args:
        truth: Panoptic json of the ground truth.
        truth_root: Folder of its PNGs.
        predicted: Panoptic json of the predictions, one for every image.
        predicted_root: Folder of their PNGs.
        workers: Threads.

    Returns:
        The script's results, as fractions.

    Raises:
        ZeroDivisionError: If no category of a kind occurs, as the script does.
    """
    module = official(PANOPTIC)
    categories = {category["id"]: category for category in truth["categories"]}
    by_image = {a["image_id"]: _copied(a) for a in predicted["annotations"]}
    pairs = [(a, by_image[a["image_id"]]) for a in truth["annotations"]]

    def count(part: Sequence[Any]) -> Any:
        return module.pq_compute_single_core(0, part, truth_root, predicted_root, categories)

    parts = [pairs[i::workers] for i in range(workers) if pairs[i::workers]]
    total = module.PQStat()
    with _explained(), ThreadPoolExecutor(workers) as pool:
        for counts in pool.map(count, parts):
            total += counts
        return module.average_pq(total, categories)


def _copied(annotation: Mapping[str, Any]) -> dict[str, Any]:
    """The script writes areas into the segments."""
    return {**annotation, "segments_info": [dict(s) for s in annotation["segments_info"]]}


def convert_panoptic(truth_root: Path, output: Path, *, split: str) -> None:
    """Write `cityscapes_panoptic_<split>.json` and its folder of PNGs.

    Args:
        truth_root: The folder gtFine.
        output: Where to.
        split: "train", "val" or "test".

    Raises:
        UserError: If there is no `*_instanceIds.png`.
    """
    module = official(PANOPTIC_CONVERTER)
    with _explained():
        module.convert2panoptic(str(truth_root), str(output), setNames=[split])


def rehearse() -> list[str]:
    """Run the official evaluators on one small image, as they will run after the training.

    Returns:
        What went wrong, one line for each evaluator; nothing where all is well.
    """
    with TemporaryDirectory(prefix="cityscapes-") as folder:
        image = _SyntheticImage(Path(folder))
        checks: dict[str, Callable[[], float]] = {
            "instance": image.instance_ap,
            "panoptic": image.panoptic_quality,
            "pixel": image.pixel_iou,
        }
        return [line for name, check in checks.items() if (line := _failure(name, check))]


def _failure(name: str, check: Callable[[], float]) -> str:
    fix = "install the tested version: pip install cityscapesscripts==2.3.0"
    try:
        score = check()
    except Exception as error:  # whatever an unknown version raises is the answer
        return f"cityscapesScripts' {name} evaluator fails ({type(error).__name__}: {error}); {fix}"
    if abs(score - 1) > 1e-9:
        return f"cityscapesScripts' {name} evaluator gives {score} for a perfect prediction; {fix}"
    return ""


class _SyntheticImage:
    """A road with a car, ground truth and perfect predictions of all three kinds."""

    def __init__(self, root: Path):
        self.root = root
        ids = np.full((32, 64), 7, np.int32)
        ids[8:24, 16:48] = 26001
        self.stem = root / "gtFine" / "val" / "toy" / "toy_000000_000000_gtFine"
        self.stem.parent.mkdir(parents=True)
        labels = np.where(ids < 1000, ids, ids // 1000).astype(np.uint8)
        Image.fromarray(ids.astype(np.uint16)).save(self.path("instanceIds.png"))
        Image.fromarray(labels).save(self.path("labelIds.png"))
        self.mask = (ids == 26001).astype(np.uint8) * 255
        self.ids, self.labels = ids, labels

    def path(self, kind: str) -> Path:
        return self.stem.with_name(f"{self.stem.name}_{kind}")

    def instance_ap(self) -> float:
        Image.fromarray(self.mask).save(self.root / "mask.png")
        text = self.root / "toy_000000_000000_pred.txt"
        text.write_text("mask.png 26 0.9\n")
        pairs = {self.path("instanceIds.png"): text}
        return float(instance_ap(pairs, predictions_root=self.root)["allAp"])

    def pixel_iou(self) -> float:
        path = self.root / "toy_000000_000000_pixels.png"
        Image.fromarray(self.labels).save(path)
        return float(pixel_scores({self.path("labelIds.png"): path})["averageScoreClasses"])

    def panoptic_quality(self) -> float:
        convert_panoptic(self.root / "gtFine", self.root, split="val")
        name = "cityscapes_panoptic_val"
        truth = read_json(self.root / f"{name}.json")
        (self.root / "predicted").mkdir()
        (annotation,) = truth["annotations"]
        write_ids(self.root / "predicted" / annotation["file_name"], self.ids)
        found = panoptic_quality(
            truth=truth,
            truth_root=self.root / name,
            predicted=truth,
            predicted_root=self.root / "predicted",
            workers=1,
        )
        return float(found["All"]["pq"])
