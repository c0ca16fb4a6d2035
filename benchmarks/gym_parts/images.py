"""The images of a task as tensors, drawn once for all networks that are trained on them."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from segtrain.data.synthetic.tasks import draw_task

SIDE = 64
HELD_OUT_SEED = 1_000_003  # training seeds are small: no image of them is ever scored


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images of one task.

    Attributes:
        pictures: uint8 [N, H, W, 3].
        labels: uint8 [N, H, W].
        needs: Bool [N, H, W], the pixels that need the mechanism.
    """

    pictures: np.ndarray
    labels: np.ndarray
    needs: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some of them for a network.

    Attributes:
        image: [B, 3, H, W], about -2..2.
        label: int64 [B, H, W].
        needs: Bool [B, H, W].
    """

    image: Tensor
    label: Tensor
    needs: Tensor


def images_of(task: str, seed: int, num: int, folder: Path) -> Images:
    """Read the images of a task, or draw and keep them.

    Args:
        task: Its name.
        seed: Of the data set.
        num: N.
        folder: Where they are kept.

    Returns:
        The images.
    """
    path = folder / f"{task}_{seed}_{num}.npz"
    if not path.exists():
        drawn = [draw_task(task=task, seed=seed, index=index, side=SIDE) for index in range(num)]
        made = {
            "pictures": np.stack([d.image for d in drawn]),
            "labels": np.stack([d.semantic for d in drawn]),
            "needs": np.stack([d.needs for d in drawn]),
        }
        folder.mkdir(parents=True, exist_ok=True)
        # Another process may draw the same: whoever comes last replaces a whole file by its equal.
        part = path.with_name(f".{os.getpid()}_{path.name}")
        np.savez(part, **made)
        part.replace(path)
    with np.load(path) as kept:
        return Images(**{name: kept[name] for name in ("pictures", "labels", "needs")})


def batch_of(images: Images, chosen: np.ndarray) -> Batch:
    """Tensors of some images.

    Args:
        images: All of them.
        chosen: [B] their numbers.

    Returns:
        The batch.
    """
    pictures = torch.from_numpy(images.pictures[chosen]).permute(0, 3, 1, 2)
    return Batch(
        image=(pictures.float() - 127.5) / 63.75,
        label=torch.from_numpy(images.labels[chosen]).long(),
        needs=torch.from_numpy(images.needs[chosen]),
    )


def training_batches(images: Images, *, size: int, steps: int, seed: int) -> Iterator[Batch]:
    """Random batches, each flipped or not along either axis.

    Args:
        images: All of them.
        size: B.
        steps: How many batches.
        seed: Of order and flips.

    Yields:
        The batches.
    """
    generator = np.random.default_rng(seed)
    num, order = len(images.labels), np.empty(0, np.int64)
    for _ in range(steps):
        if len(order) < size:
            order = np.concatenate([order, generator.permutation(num)])
        chosen, order = order[:size], order[size:]
        axes = [axis for axis in (-2, -1) if generator.random() < 0.5]
        batch = batch_of(images, chosen)
        image, label, needs = (x.flip(axes) for x in (batch.image, batch.label, batch.needs))
        yield Batch(image=image, label=label, needs=needs)
