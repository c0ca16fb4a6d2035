"""Random generators of a process: seeding, storing as tensors and plain types, restoring.

Augmentation needs none of them: its random numbers depend on seed, epoch and image alone, in
whichever worker. What is left is the model's own randomness (dropout, stochastic depth).
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_generators(seed: int) -> None:
    """Seed Python, NumPy and torch, on all devices.

    Args:
        seed: Any integer that is not negative.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def generator_state() -> dict[str, Any]:
    """Take the state of all generators of this process.

    Returns:
        Tensors and plain types, which `torch.load` reads without running code.
    """
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }


def set_generator_state(state: dict[str, Any]) -> None:
    """Put the generators back.

    Args:
        state: Of `generator_state`.
    """
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


@contextmanager
def generators_kept() -> Iterator[None]:
    """Leave the generators as they were, so that what happens inside does not change training."""
    before = generator_state()
    try:
        yield
    finally:
        set_generator_state(before)
