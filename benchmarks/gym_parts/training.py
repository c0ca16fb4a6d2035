"""Train one network on one task with one seed, and count on held-out images what it gets right."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.gym_parts.images import (
    HELD_OUT_SEED,
    Images,
    batch_of,
    images_of,
    training_batches,
)
from benchmarks.gym_parts.pairs import PAIRS
from benchmarks.gym_parts.parts import count_parameters, task_loss
from segtrain.data.synthetic.tasks import TASKS
from segtrain.evaluation.boundary_iou import BoundaryCounts

SIDES = ("method", "twin")
CLIP = 5.0


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every network gets.

    Attributes:
        steps: Training steps.
        batch: Images of each.
        images: Images to train on.
        held_out: Images to be scored.
        rate: Highest learning rate of AdamW; linear warm-up, then a cosine to zero.
        decay: Weight decay.
    """

    steps: int = 200
    batch: int = 16
    images: int = 1500
    held_out: int = 200
    rate: float = 3e-3
    decay: float = 0.01


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training.

    Attributes:
        task: Name of the images.
        pair: Name of the networks.
        side: "method" or "twin".
        seed: Of weights, images and their order; the same for both sides.
        budget: What it gets.
    """

    task: str
    pair: str
    side: str
    seed: int
    budget: Budget

    def about(self) -> dict[str, Any]:
        """Plain values, by which a finished run is known again."""
        return asdict(self)


def train_and_count(run: Run, folder: Path) -> dict[str, Any]:
    """Train, then count.

    Args:
        run: What.
        folder: Where images are kept.

    Returns:
        "right" and "union": [N][K] pixels of each held-out image and scored class; "parameters",
        "loss" (mean of the last tenth of the steps), "seconds" of processor time, and what was run.
    """
    begin = time.process_time()
    budget = run.budget
    images = images_of(run.task, run.seed, budget.images, folder)
    held_out = images_of(run.task, HELD_OUT_SEED, budget.held_out, folder)
    network = build(run.task, run.pair, run.side, run.seed)
    losses = _train(network, images, run)
    right, union = count(network, held_out, run.task)
    return {
        "run": run.about(),
        "right": right.tolist(),
        "union": union.tolist(),
        "parameters": count_parameters(network),
        "loss": float(np.mean(losses[-max(1, len(losses) // 10) :])),
        "seconds": time.process_time() - begin,
    }


def build(task: str, pair: str, side: str, seed: int) -> nn.Module:
    """A network with fresh weights.

    Args:
        task: Name of the images.
        pair: Name of the networks.
        side: "method" or "twin".
        seed: Of the weights.

    Returns:
        The network.
    """
    torch.manual_seed(seed)
    builders = {"method": PAIRS[pair].method, "twin": PAIRS[pair].twin}
    return builders[side](len(TASKS[task].classes))


def _train(network: nn.Module, images: Images, run: Run) -> list[float]:
    budget = run.budget
    optimizer = torch.optim.AdamW(network.parameters(), lr=budget.rate, weight_decay=budget.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=budget.rate,
        total_steps=budget.steps,
        pct_start=0.1,
        cycle_momentum=False,
    )
    network.train()
    losses = []
    batches = training_batches(images, size=budget.batch, steps=budget.steps, seed=run.seed)
    for batch in batches:
        own = getattr(network, "loss", None)
        loss: Tensor = own(batch) if own else task_loss(network(batch.image), batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def count(network: nn.Module, images: Images, task: str) -> tuple[np.ndarray, np.ndarray]:
    """What is right, image by image, on the pixels that need the mechanism alone.

    Args:
        network: Image to logits.
        images: N of them.
        task: Name of the task; of `boundary` the bands of Boundary IoU are counted.

    Returns:
        Intersections and unions, int64 [N, K'] of the K' scored classes.
    """
    network.eval()
    found = []
    for start in range(0, len(images.labels), 50):
        chosen = np.arange(start, min(start + 50, len(images.labels)))
        predicted = network(batch_of(images, chosen).image).argmax(1).to(torch.uint8).numpy()
        for number, labels in zip(chosen, predicted, strict=True):
            found.append(counts_of(labels, images.labels[number], images.needs[number], task))
    right, union = np.array(found).transpose(1, 0, 2)
    return right, union


def counts_of(
    predicted: np.ndarray, truth: np.ndarray, needs: np.ndarray, task: str
) -> tuple[np.ndarray, np.ndarray]:
    """Intersection and union of the scored classes of one image.

    Args:
        predicted: uint8 [H, W].
        truth: uint8 [H, W].
        needs: Bool [H, W].
        task: Name of the task.

    Returns:
        Two int64 [K'].
    """
    scored = list(TASKS[task].scored)
    if task == "boundary":
        counts = BoundaryCounts(num_classes=len(TASKS[task].classes))
        counts.update(predicted, truth)
        both, true, guessed = counts.counts[:, scored]
        return both, true + guessed - both
    kept = truth[needs], predicted[needs]
    true, guessed = (np.stack([values == k for k in scored]) for values in kept)
    return (true & guessed).sum(1), (true | guessed).sum(1)
