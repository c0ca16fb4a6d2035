"""A model over a split: image by image, nothing kept but integer counts of each.

Every process takes each n-th image, so that none is counted twice, and adds up its counts.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from segtrain import dist
from segtrain.config.schema import RunConfig, window_and_stride
from segtrain.data.datasets import Layout, Sample
from segtrain.data.labels import Labels
from segtrain.data.reading import read_image, read_labels
from segtrain.errors import UserError
from segtrain.evaluation.boundary_iou import BoundaryCounts
from segtrain.evaluation.confusion import ConfusionMatrix
from segtrain.evaluation.per_image import Recorder, write_counts
from segtrain.evaluation.report import Report
from segtrain.evaluation.size_groups import ClassSizes, size_groups
from segtrain.files import write_json
from segtrain.inference import Inferencer

Progress = Callable[[int, int], None]
Pair = tuple[NDArray[np.uint8], Labels]


def build_inferencer(
    model: nn.Module,
    config: RunConfig,
    layout: Layout,
    device: torch.device | str,
    *,
    precision: str = "fp32",
) -> Inferencer:
    """The inference that a configuration describes.

    Args:
        model: On `device`; its `normalisation` is that of its encoder.
        config: Sections `eval` and `data`.
        layout: The data set: how many classes, and which change places in a mirror.
        device: Of the model.
        precision: "fp32" or "bf16".

    Returns:
        The inferencer.
    """
    window, stride = window_and_stride(config)
    chosen = config.data.normalisation
    return Inferencer(
        model,
        num_classes=len(layout.classes),
        normalisation=str(model.normalisation) if chosen == "auto" else chosen,
        device=device,
        mode=config.eval.mode,
        window=window,
        stride=stride,
        pad=config.eval.pad,
        window_batch=config.eval.window_batch,
        ratios=config.eval.ratios,
        flip=config.eval.flip,
        base_size=config.eval.base_size or config.data.base_size,
        flip_pairs=layout.flip_pairs,
        precision=precision,
    )


def evaluate(
    model: nn.Module,
    layout: Layout,
    split: str,
    config: RunConfig,
    device: torch.device | str,
    *,
    detailed: bool = True,
    statistic: str = "component",
    precision: str = "fp32",
    json_path: Path | None = None,
    counts_path: Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Score a model on a split at the original size of its labels; a call of all processes.

    Args:
        model: On `device`.
        layout: The data set.
        split: Which split.
        config: Of the run.
        device: Where the model is.
        detailed: Whether to measure class sizes and boundaries and keep every image as well.
        statistic: What classes are ranked by, a key of `size_groups.STATISTICS`.
        precision: "fp32" or "bf16".
        json_path: File for the result; None writes none.
        counts_path: File for the counts of every image; None writes none. Needs `detailed`.
        progress: Called with images done and all images of this process.

    Returns:
        The scores, the same on every process.

    Raises:
        UserError: If a file cannot be read, sizes disagree, or a label is unknown.
    """
    inferencer = build_inferencer(model, config, layout, device, precision=precision)
    samples = layout.samples(split)
    counts = Counts(len(layout.classes), detailed=detailed)
    try:
        _count(counts, inferencer, layout, samples[dist.rank() :: dist.world_size()], progress)
        problem = ""
    except UserError as error:
        problem = str(error)
    # A process that stopped alone would leave the others waiting.
    if problems := list(filter(None, dist.gather_objects(problem))):
        raise UserError(problems[0])
    counts.all_reduce(device)
    report = counts.report(layout, split, inferencer, images=len(samples), statistic=statistic)
    if json_path is not None and dist.is_main():
        write_json(json_path, report.as_dict())
    if counts_path is not None and counts.images is not None and dist.is_main():
        about = {key: report.as_dict()[key] for key in ("dataset", "split", "classes", "inference")}
        write_counts(counts_path, counts.images.counts(about, counts.sizes))
    return report


def _count(
    counts: "Counts",
    inferencer: Inferencer,
    layout: Layout,
    samples: Sequence[Sample],
    progress: Progress | None,
) -> None:
    for done, (sample, (image, label)) in enumerate(read_ahead(layout, samples), start=1):
        dist.came_to(f"the evaluation of {sample.name}")
        counts.update(inferencer.labels(image), label, sample)
        if progress is not None:
            progress(done, len(samples))


class Counts:
    """All that is counted.

    Args:
        num_classes: K.
        detailed: Whether class sizes and boundaries are, and every image is kept.
    """

    def __init__(self, num_classes: int, *, detailed: bool) -> None:
        self.confusion = ConfusionMatrix(num_classes)
        self.sizes = ClassSizes(num_classes) if detailed else None
        self.boundary = BoundaryCounts(num_classes) if detailed else None
        self.images = Recorder() if detailed else None

    def update(self, prediction: NDArray[np.uint8], label: Labels, sample: Sample) -> None:
        """Count one image.

        Args:
            prediction: uint8 [H, W].
            label: uint8 [H, W].
            sample: What they belong to.

        Raises:
            UserError: If the sizes disagree or a value is unknown.
        """
        one = ConfusionMatrix(self.confusion.num_classes)
        one.update(prediction, label, name=str(sample.label))
        self.confusion.merge(one)
        if self.sizes is not None and self.boundary is not None and self.images is not None:
            self.images.add(sample.name, one)
            self.sizes.update(label)
            self.boundary.update(prediction, label)

    def all_reduce(self, device: torch.device | str) -> None:
        """Add up over processes.

        Args:
            device: Where they communicate.
        """
        for part in filter(None, (self.confusion, self.sizes, self.boundary)):
            part.all_reduce(device)
        if self.images is not None:
            self.images.gather()

    def report(
        self, layout: Layout, split: str, inferencer: Inferencer, *, images: int, statistic: str
    ) -> Report:
        """What the counts say.

        Args:
            layout: The data set.
            split: Which split.
            inferencer: What predicted.
            images: How many images.
            statistic: What classes are ranked by.

        Returns:
            The report.
        """
        scores = self.confusion.scores()
        sizes, boundary = self.sizes, self.boundary
        return Report(
            dataset=layout.name,
            split=split,
            images=images,
            classes=layout.classes.names,
            settings=inferencer.settings(),
            scores=scores,
            statistic=statistic if sizes else None,
            groups=size_groups(sizes.statistic(statistic), scores.iou) if sizes else (),
            boundary=tuple(map(float, boundary.iou())) if boundary else None,
        )


def read_ahead(
    layout: Layout, samples: Sequence[Sample], *, threads: int = 2
) -> Iterator[tuple[Sample, Pair]]:
    """Read images and labels a little before they are needed.

    Args:
        layout: The data set.
        samples: Which images.
        threads: How many are read at the same time.

    Yields:
        Each sample with its image and labels, in order.

    Raises:
        UserError: If a file cannot be read, or image and label differ in size.
    """

    def read(sample: Sample) -> Pair:
        image, label = read_image(sample.image), read_labels(layout, sample)
        if image.shape[:2] != label.shape:
            raise UserError(
                f"{sample.image} has {image.shape[:2]} pixels, {sample.label} {label.shape} "
                "(height, width); see: segtrain data check"
            )
        return image, label

    with ThreadPoolExecutor(threads) as pool:
        waiting = [pool.submit(read, sample) for sample in samples[:threads]]
        for number, sample in enumerate(samples):
            pair = waiting.pop(0).result()
            for later in samples[number + threads : number + threads + 1]:
                waiting.append(pool.submit(read, later))
            yield sample, pair
