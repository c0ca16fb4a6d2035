"""What a configuration is made into: data set, model with its first weights, evaluation."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from segtrain import dist
from segtrain.config.schema import RunConfig
from segtrain.data.boundary import BoundaryLabels
from segtrain.data.check import check_config
from segtrain.data.dataset import SegDataset, build_train_transform
from segtrain.data.datasets import Layout, build_layout
from segtrain.data.loader import EpochSampler, train_loader
from segtrain.evaluation.evaluate import evaluate
from segtrain.models import build_model
from segtrain.train.feed import Batch, Feed
from segtrain.train.progress import counter
from segtrain.train.start import Parts
from segtrain.train.state import micro_batch
from segtrain.weights.load import initial_weights

_FAR = 1_000_003  # seeds of orders after a rewind shall not be those of other runs


def build_parts(config: RunConfig, device: torch.device, restoring: bool) -> Parts:
    """Build what a run is made of.

    Args:
        config: Of the run.
        device: Of the model.
        restoring: Whether a checkpoint follows, so that no initial weights are needed.

    Returns:
        The parts.

    Raises:
        UserError: If the data or the weights are missing or do not fit.
    """
    layout = build_layout(config.data)
    layout.samples(config.data.val_split)  # a missing one shall not come to light hours later
    notes = [] if restoring else check_data(config)
    model = build_model(config.model, len(layout.classes), image_size=config.data.crop)
    if not restoring:
        notes += initial_weights(model, config)
    dataset = SegDataset(
        layout,
        config.data.train_split,
        build_train_transform(config.data, layout, normalisation=model.normalisation),
        seed=config.train.seed,
        targets=further_labels(config),
        images=config.data.train_images,
    )
    return Parts(
        model=model,
        feed=build_feed(config, layout, dataset, device),
        images=len(dataset),
        notes=notes,
    )


def further_labels(config: RunConfig) -> BoundaryLabels | None:
    """What a data set makes from its labels beside them.

    Args:
        config: Of the run.

    Returns:
        Boundaries, where the loss needs them.
    """
    options = config.loss.boundary
    if options is None:
        return None
    return BoundaryLabels(max_distance=options.max_distance, min_area=options.min_area)


def check_data(config: RunConfig) -> list[str]:
    """Look through the data as `data.check` says, in the main process for all.

    Args:
        config: Of the run.

    Returns:
        What the user should know, a line each.

    Raises:
        UserError: If anything would stop the run, or train it on nonsense.
    """
    if not dist.is_main():
        return []
    reports = check_config(config.data, progress=counter("checking the data"))
    return [f"data, {report.split}: {note}" for report in reports for note in report.notes]


def build_feed(
    config: RunConfig, layout: Layout, dataset: SegDataset, device: torch.device
) -> Feed:
    """Connect data and evaluation to the loop.

    Args:
        config: Of the run.
        layout: The data set.
        dataset: Its training split.
        device: Of the model.

    Returns:
        The feed.
    """
    options = config.train

    def batches(step: int, rewinds: int) -> Iterator[Batch]:
        sampler = EpochSampler(
            num_samples=len(dataset),
            global_batch=options.global_batch,
            micro_batch=micro_batch(options),
            seed=options.seed + _FAR * rewinds,
            rank=dist.rank(),
            world=dist.world_size(),
            step=step,
        )
        return iter(
            train_loader(
                dataset,
                sampler,
                workers=config.data.workers,
                pin_memory=device.type == "cuda",
            )
        )

    return Feed(batches=batches, evaluate=build_score(config, layout, device))


def build_score(
    config: RunConfig, layout: Layout, device: torch.device
) -> Callable[[nn.Module], dict[str, Any]]:
    """What training evaluates with.

    Args:
        config: Of the run.
        layout: The data set.
        device: Of the model.

    Returns:
        A model to its scores on `data.val_split`; a call of all processes.
    """

    def score(model: nn.Module) -> dict[str, Any]:
        report = evaluate(
            model,
            layout,
            config.data.val_split,
            config,
            device,
            detailed=False,
            precision="bf16" if config.train.precision == "bf16" else "fp32",
        )
        return report.as_dict()

    return score
