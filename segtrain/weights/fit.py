"""Which tensors of a file find a place in a model: as numbers, as a table, and loaded."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor

from segtrain.errors import UserError
from segtrain.models.network import Network
from segtrain.models.segmenter import SegmenterModel
from segtrain.weights.grids import Grid, fitted, tables_of
from segtrain.wording import first_of

POSITIONS = "encoder.pos_embed"  # of a Segmenter
NO_GRIDS: Mapping[str, Grid] = MappingProxyType({})
_COLUMNS = ("part", "matched", "missing", "wrong shape", "unexpected")
_EXAMPLES = 3

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What a file gives a model, by the model's names.

    Attributes:
        matched: In both, of equal shape.
        missing: In the model only.
        unexpected: In the file only.
        wrong_shape: In both, of different shapes: name -> (in the file, in the model).
        reinitialised: Of the model, kept at their random start since the classes are others.
        resized: Tables that were not taken as they are: name -> (what it is, old and new grid).
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    wrong_shape: Mapping[str, tuple[Shape, Shape]]
    reinitialised: tuple[str, ...] = ()
    resized: Mapping[str, tuple[str, Grid, Grid]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every tensor has found its place, or is known to start at random."""
        return not (self.missing or self.unexpected or self.wrong_shape)

    def table(self) -> str:
        """One aligned line per part of the model, then examples of what does not fit."""
        groups = (self.matched, self.missing, tuple(self.wrong_shape), self.unexpected)
        counts = [Counter(_part(name) for name in names) for names in groups]
        parts = sorted(set().union(*counts))
        rows = [_COLUMNS, *((part, *(str(c[part]) for c in counts)) for part in parts)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
        lines = [_line(row, widths) for row in rows]
        return "\n".join([*lines, *self._examples()])

    def notes(self) -> list[str]:
        """What happened to tensors that were not taken as they are, a line each."""
        lines = []
        for what, (h, w), (new_h, new_w) in self.resized.values():
            lines.append(f"{what} resized from {h}x{w} to {new_h}x{new_w}")
        if self.reinitialised:
            lines.append(f"other classes, so these start anew: {', '.join(self.reinitialised)}")
        return lines

    def _examples(self) -> list[str]:
        lines = [
            f"wrong shape: {name} is {old} in the file, {new} in the model"
            for name, (old, new) in list(self.wrong_shape.items())[:_EXAMPLES]
        ]
        for title, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                lines.append(f"{title}: {first_of(names)}")
        return lines


def _part(name: str) -> str:
    """The part that a tensor is counted for: `encoder.blocks`, `decoder`, ..."""
    first, _, rest = name.partition(".")
    return f"{first}.blocks" if rest.startswith("blocks.") else first


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [row[0].ljust(widths[0])]
    cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    return "  ".join(cells).rstrip()


def load_into(
    model: SegmenterModel | Network,
    tensors: Mapping[str, Tensor],
    *,
    source: str,
    parts: tuple[str, ...] = ("encoder.", "decoder."),
    grids: Mapping[str, Grid] = NO_GRIDS,
    new_classes: bool = False,
) -> Fit:
    """Load tensors under our names into a model, all of them or none.

    Args:
        model: Where to.
        tensors: In our layout (`layouts.to_segmenter`).
        source: What messages call the file.
        parts: Beginnings of the names that shall be filled.
        grids: Grids (h, w) of the file's tables, as far as they are known; else as `fitted` says.
        new_classes: Whether tensors of another number of classes may start at random.

    Returns:
        What was loaded.

    Raises:
        UserError: If tensors are missing, left over or of another shape; nothing is loaded then.
    """
    given, fit = _prepared(model, tensors, source, parts, grids, new_classes)
    if not fit.complete:
        raise UserError(f"{source} does not fit the model:\n{fit.table()}")
    model.load_state_dict({name: given[name] for name in fit.matched}, strict=False)
    return fit


def compare(
    model: SegmenterModel | Network,
    tensors: Mapping[str, Tensor],
    *,
    source: str,
    parts: tuple[str, ...] = ("encoder.", "decoder."),
    grids: Mapping[str, Grid] = NO_GRIDS,
) -> Fit:
    """What `load_into` would find; nothing is loaded, so the model may be on the meta device.

    Args:
        model: As in `load_into`.
        tensors: As in `load_into`.
        source: As in `load_into`.
        parts: As in `load_into`.
        grids: As in `load_into`.

    Returns:
        What fits and what does not.

    Raises:
        UserError: If the grid of a table is unknown.
    """
    return _prepared(model, tensors, source, parts, grids, False)[1]


def _prepared(
    model: SegmenterModel | Network,
    tensors: Mapping[str, Tensor],
    source: str,
    parts: tuple[str, ...],
    grids: Mapping[str, Grid],
    new_classes: bool,
) -> tuple[dict[str, Tensor], Fit]:
    """The tensors with tables for the model's grids, and how they fit."""
    given = {n: v for n, v in tensors.items() if n.startswith(parts)}
    resized = {}
    tables = {name: table for name, table in tables_of(model).items() if name in given}
    for name, table in tables.items():
        given[name], grid_change = fitted(given[name], table, grid=grids.get(name), source=source)
        if grid_change is not None:
            resized[name] = (table.what, *grid_change)
    file = {name: tuple(value.shape) for name, value in given.items()}
    own = {n: v for n, v in model.state_dict().items() if n.startswith(parts)}
    state = {name: tuple(value.shape) for name, value in own.items()}
    _check_kinds(own, given, source)
    wrong = {n: (file[n], state[n]) for n in state if n in file and file[n] != state[n]}
    anew = set(model.class_parameters()) & set(wrong) if new_classes else set()
    fit = Fit(
        matched=tuple(n for n in state if n in file and n not in wrong),
        missing=tuple(n for n in state if n not in file),
        unexpected=tuple(n for n in file if n not in state),
        wrong_shape={n: shapes for n, shapes in wrong.items() if n not in anew},
        reinitialised=tuple(n for n in state if n in anew),
        resized=resized,
    )
    return given, fit


def _check_kinds(own: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """Refuse whole or complex numbers where the model has real ones: they mean something else."""
    for name, value in own.items():
        if value.is_floating_point() and name in given and not given[name].is_floating_point():
            kind = str(given[name].dtype).removeprefix("torch.")
            raise UserError(f"{source}: {name} holds {kind}, expected float32; save it as that")
