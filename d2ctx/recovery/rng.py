"""Random generators of this process: storing, restoring, and seeding for one sample.

Stored are tensors and plain types only, which `torch.load(weights_only=True)` reads.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

State = dict[str, Any]


def generator_state() -> State:
    """Take the state of Python's, NumPy's and torch's generators.

    Returns:
        Tensors and plain types; CUDA's generator of the current device where CUDA is in use.
    """
    return {
        **_host_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_generator_state(state: State) -> None:
    """Put the generators back.

    Args:
        state: Of `generator_state`.
    """
    _set_host_state(state)
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def generators_kept() -> Iterator[None]:
    """Leave the generators as they were: what happens inside must not change training.

    Yields:
        Nothing.
    """
    before = generator_state()
    try:
        yield
    finally:
        set_generator_state(before)


@contextmanager
def seeded(*seed: int) -> Iterator[None]:
    """Let the generators of the CPU follow from numbers, and be as before afterwards.

    Args:
        seed: Any numbers that are not negative.

    Yields:
        Nothing.
    """
    before = _host_state()
    words = np.random.SeedSequence(seed).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.default_generator.manual_seed(int(words[2]))  # manual_seed() would seed CUDA as well
    try:
        yield
    finally:
        _set_host_state(before)


def _host_state() -> State:
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }


def _set_host_state(state: State) -> None:
    torch.set_rng_state(state["torch"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
