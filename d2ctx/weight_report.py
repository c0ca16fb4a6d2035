"""Which tensors of a weight file find a place in a model, as numbers and as a table."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from d2ctx.wording import EXAMPLES, first_of

_COLUMNS = ("part", "loaded", "missing", "wrong shape", "unexpected", "parameters")
# Batch norms count their steps; nothing is lost where a frozen norm has no such counter.
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class WeightReport:
    """What a file would give a model, by tensor name.

    Attributes:
        matched: In both, with equal shapes.
        missing: In the model only.
        unexpected: In the file only.
        wrong_shape: In both with different shapes: name -> (shape in the file, in the model).
        parameters: Part of the model -> (elements that are matched, all elements), counting
            trainable and frozen parameters but no buffers.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong_shape: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    parameters: Mapping[str, tuple[int, int]]

    @property
    def file_fraction(self) -> float:
        """Share of the file's tensors that have a place in the model."""
        named = len(self.matched) + len(self.unexpected) + len(self.wrong_shape)
        return len(self.matched) / named if named else 0.0

    @property
    def model_fraction(self) -> float:
        """Share of the model's parameters that the file fills, by number of elements."""
        total = sum(count for _, count in self.parameters.values())
        return sum(filled for filled, _ in self.parameters.values()) / total if total else 1.0

    @property
    def complete(self) -> bool:
        """Whether file and model have the same tensors."""
        return not (self.missing or self.unexpected or self.wrong_shape)

    def table(self) -> str:
        """One aligned line per part of the model, then examples of what does not fit."""
        rows = [_COLUMNS, *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
        lines = ["  ".join(_cells(row, widths)).rstrip() for row in rows]
        return "\n".join(lines + self._examples())

    def _rows(self) -> list[tuple[str, ...]]:
        groups = (self.matched, self.missing, tuple(self.wrong_shape), self.unexpected)
        counts = [Counter(self._part(name) for name in names) for names in groups]
        parts = sorted(set().union(*counts))
        return [
            (part, *(str(count[part]) for count in counts), self._filled(part)) for part in parts
        ]

    def _part(self, name: str) -> str:
        part = part_of(name)
        return part if part in self.parameters else "(elsewhere)"

    def _filled(self, part: str) -> str:
        filled, total = self.parameters.get(part, (0, 0))
        return f"{filled / total:.0%} of {total:,}" if total else "-"

    def _examples(self) -> list[str]:
        lines = [
            f"wrong shape: {name} is {file} in the file, {model} in the model"
            for name, (file, model) in list(self.wrong_shape.items())[:EXAMPLES]
        ]
        for title, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                lines.append(f"{title}: {first_of(names)}")
        return lines


def _cells(row: tuple[str, ...], widths: list[int]) -> list[str]:
    return [
        row[0].ljust(widths[0]),
        *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
    ]


def part_of(name: str) -> str:
    """The top-level part that a tensor belongs to."""
    return name.partition(".")[0]


def compare_state(model: nn.Module, weights: Mapping[str, Tensor | np.ndarray]) -> WeightReport:
    """Compare a model's tensors with a file's by name and shape.

    Args:
        model: The model that would be filled.
        weights: Tensor name -> values; a common prefix "module." is ignored.

    Returns:
        The report; batch norms' step counters are left out.
    """
    if all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    file = {n: tuple(v.shape) for n, v in weights.items() if not n.endswith(_COUNTER)}
    state = {n: tuple(v.shape) for n, v in model.state_dict().items() if not n.endswith(_COUNTER)}
    both = [name for name in state if name in file]
    matched = {name for name in both if state[name] == file[name]}
    return WeightReport(
        matched=tuple(name for name in both if name in matched),
        missing=tuple(name for name in state if name not in file),
        unexpected=tuple(name for name in file if name not in state),
        wrong_shape={n: (file[n], state[n]) for n in both if n not in matched},
        parameters=_parameters(model, matched),
    )


def _parameters(model: nn.Module, matched: set[str]) -> dict[str, tuple[int, int]]:
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        filled, total = counts.get(part_of(name), (0, 0))
        size = parameter.numel()
        counts[part_of(name)] = (filled + size * (name in matched), total + size)
    return counts
