"""What the loop is fed with: batches from any update on, and scores of a model."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

Batch = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Feed:
    """Where the loop gets what it does not make itself.

    Args:
        batches: (update from 0, number of rewinds) to the micro batches of this process from there
            on: "image" [B, 3, H, W] and "label" [B, H, W]. Every rewind gives another order.
        evaluate: Model in evaluation mode to its scores, of which "miou" decides what is best; a
            call of all processes.
    """

    batches: Callable[[int, int], Iterator[Batch]]
    evaluate: Callable[[nn.Module], dict[str, Any]]
