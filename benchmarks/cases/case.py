"""The description of one benchmark case."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from benchmarks.rows import Target

TIME, MEMORY, ERROR = "time", "peak memory growth", "error against float64"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Forms that compute the same thing from the same tensors.

    Attributes:
        name: Unique name, with the size.
        make: Draws the inputs on the CPU in float32, from the global seed.
        forms: Name -> function that makes the callable; modules count their parameters' gradients.
        baseline: The form that ratios refer to.
        backward: Whether a round includes the backward pass.
        targets: Form -> metric -> target.
        reference: Form whose float64 result is the truth for the error; "" for no error row.
        once: One round without warm-up, for cases of many seconds.
        only_on: "cpu", "cuda", or "" for both.
    """

    name: str
    make: Callable[[], Sequence[Tensor]]
    forms: Mapping[str, Callable[[], Callable[..., Tensor]]]
    baseline: str
    backward: bool = True
    targets: Mapping[str, Mapping[str, Target]] = field(default_factory=dict)
    reference: str = ""
    once: bool = False
    only_on: str = ""

    @property
    def phases(self) -> str:
        """What a round consists of."""
        return "forward + backward" if self.backward else "forward"
