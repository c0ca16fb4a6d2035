"""Whether going on with a run is what the run itself did: updates made again, and compared.

The run is put where one of its checkpoints was written, makes its next updates once more, and every
number that its journal holds of them is compared, as well as the state of a checkpoint on the way.
Nothing is written into the folder of the run.
"""

import io
import math
from collections.abc import Container, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from segtrain import dist
from segtrain.errors import UserError
from segtrain.train.checkpoint import DamagedError, checkpoints, read_checkpoint, step_of
from segtrain.train.folder import CONFIG_NAME, check_unchanged, environment_changes, read_config
from segtrain.train.guard import BrokenUpdate
from segtrain.train.journal import NAME as JOURNAL_NAME
from segtrain.train.journal import read_journal
from segtrain.train.loop import Run
from segtrain.train.progress import Progress, counter
from segtrain.train.start import Build, restored
from segtrain.wording import plural

TOLERANCE_OF_GPUS = 1e-3  # their sums have no order, unless train.deterministic is set
RATE, SKIPPED, STATE = "lr", "skipped", "state"
# (what, number of the update) -> value; NaN where the update was skipped.
Numbers = dict[tuple[str, int], float]


@dataclass
class Compared:
    """One kind of number.

    Args:
        what: Its name.
        count: How many were compared.
        largest: Largest relative difference, infinite where one of two is missing.
        update: Where that is; None where all are the same.
    """

    what: str
    count: int = 0
    largest: float = 0.0
    update: int | None = None


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What came of it.

    Args:
        checkpoint: Name of the file.
        first: First update that was made again.
        last: Last one.
        tolerance: What a relative difference may be.
        rows: Every kind of number.
        differs: The first update that differs, with what; None where none does.
        notes: What the user should know, a line each.
    """

    checkpoint: str
    first: int
    last: int
    tolerance: float
    rows: list[Compared]
    differs: str | None
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """A table and the verdict."""
        width = max(len(row.what) for row in self.rows)
        lines = [f"updates {self.first} to {self.last} again from {self.checkpoint}"]
        lines += [f"  {'':{width}}  compared  largest difference"]
        for row in self.rows:
            place = "" if row.update is None else f"  (update {row.update})"
            lines.append(f"  {row.what:{width}}  {row.count:8}  {row.largest:.3g}{place}")
        if self.differs is None:
            same = "exact" if not any(row.largest for row in self.rows) else "the same within"
            lines.append(same if same == "exact" else f"{same} {self.tolerance:g}")
        else:
            lines.append(f"not the same (tolerance {self.tolerance:g}): {self.differs}")
        return "\n".join([*self.notes, *lines])

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


class _Recorder:
    """Stands in for the journal of a run."""

    def __init__(self) -> None:
        self.numbers: Numbers = {}

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        self.numbers |= dict(_numbers({"event": event, "step": step, **values}))


def prove(folder: Path, count: int, *, build: Build, tolerance: float | None = None) -> Proof:
    """Make updates of a run again; a call of all processes.

    Args:
        folder: Of the run.
        count: How many updates.
        build: As in `train`.
        tolerance: Largest relative difference; None is 0 on a CPU and with `train.deterministic`,
            else `TOLERANCE_OF_GPUS`.

    Returns:
        What came of it.

    Raises:
        UserError: If there is nothing to compare with.
    """
    if count < 1:
        raise UserError(f"--prove {count}: expected at least one update; write --prove 20")
    config = read_config(folder)
    known, notes = dict(_known(folder)), list[str]()
    with dist.process_group() as device, TemporaryDirectory() as place:
        path, saved, count = _start(folder, known, count, notes)
        check_unchanged(saved["config"], config, folder / CONFIG_NAME)
        _check_processes(saved)
        if tolerance is None:
            exact = device.type == "cpu" or config.train.deterministic
            tolerance = 0.0 if exact else TOLERANCE_OF_GPUS
        state, parts = restored(config, saved, build=build, device=device)
        state.rewinds = max(state.rewinds, _rewinds(folder, state.step))
        recorder, first = _Recorder(), state.step + 1
        run = Run(
            config=config,
            folder=Path(place),
            state=state,
            feed=parts.feed,
            device=device,
            journal=recorder,  # type: ignore[arg-type]
            progress=Progress(total=config.train.iters, stream=io.StringIO()),
        )
        states = _again(run, count, _steps(folder))
        wanted = {key: v for key, v in known.items() if first <= key[1] < first + count}
        rows, differs = _compared(wanted, recorder.numbers, states, tolerance)
        if differs is not None:
            notes += environment_changes(folder, device)
        proof = Proof(
            checkpoint=path.name,
            first=first,
            last=first + count - 1,
            tolerance=tolerance,
            rows=rows,
            differs=differs,
            notes=notes,
        )
        return dist.gather_objects(proof)[0]


def _known(folder: Path) -> Iterator[tuple[tuple[str, int], float]]:
    """What the journal holds of every update."""
    for record in read_journal(folder / JOURNAL_NAME):
        yield from _numbers(record)


def _numbers(record: Mapping[str, Any]) -> Iterator[tuple[tuple[str, int], float]]:
    if RATE in record:
        yield (RATE, record["step"]), record[RATE]
    updates = dict(record.get("updates", {}))
    first = updates.pop("first", 0)
    for offset in range(updates.pop("count", 0)):
        yield (SKIPPED, first + offset), float(not updates)
        for name, values in updates.items():
            value = values[offset]
            yield (name, first + offset), math.nan if value is None else value


def _start(
    folder: Path, known: Numbers, count: int, notes: list[str]
) -> tuple[Path, dict[str, Any], int]:
    """The newest checkpoint with enough updates after it, or else with any, and their number."""
    updates = {update for what, update in known if what == SKIPPED}
    end = max(updates, default=0)
    found = [(path, _after(step, updates, count)) for path, step in _steps(folder).items()]
    for path, after in sorted(found, key=lambda item: item[1] < count):  # stable: newest first
        if not after:
            continue
        try:
            saved = read_checkpoint(path)
        except DamagedError as error:
            notes.append(f"{error}; it is left out")
            continue
        if after < count:
            notes.append(
                f"no checkpoint has {plural(count, 'update')} after it in the journal, which ends "
                f"with update {end}; {plural(after, 'update')} instead"
            )
        return path, saved, after
    raise UserError(
        f"{folder}: no checkpoint has an update after it in the journal, which ends with update "
        f"{end}; go on with the run first, or keep older checkpoints from now on (train.keep: 2)"
    )


def _after(step: int, updates: Container[int], most: int) -> int:
    """How many updates without a gap the journal has after a step."""
    return next((n for n in range(most) if step + n + 1 not in updates), most)


def _steps(folder: Path) -> dict[Path, int]:
    """Checkpoints, the newest first, and their steps; those that cannot be read are left out."""
    found = {path: step_of(path) for path in checkpoints(folder)}
    return {path: step for path, step in found.items() if step is not None}


def _check_processes(saved: Mapping[str, Any]) -> None:
    there, here = len(saved["generators"]), dist.world_size()
    if there != here:
        raise UserError(
            f"the checkpoint is of {plural(there, 'process')}, this is {here}; start as many: "
            f"torchrun --nproc-per-node {there} -m segtrain resume ..."
        )


def _rewinds(folder: Path, step: int) -> int:
    """How often the run came back to a step before it went on from there."""
    records = read_journal(folder / JOURNAL_NAME)
    return max((r.get("rewinds", 0) for r in records if r["step"] == step), default=0)


def _again(run: Run, count: int, steps: Mapping[Path, int]) -> Numbers:
    """Make the updates; how far the state is from that of a checkpoint on the way."""
    found: Numbers = {}
    state, say = run.state, counter("updates made again") if dist.is_main() else None
    for done in range(count):
        rate = run.schedule.apply(state.optimizer, state.step)
        try:
            run.advance(rate)
        except BrokenUpdate:  # the run left it out as well, or they differ here
            run.guard.put_back()
            state.step += 1
            run.report({}, rate)
        run.write("rate", {RATE: rate})
        for path in (path for path, step in steps.items() if step == state.step):
            now = state.state_dict()
            with suppress(DamagedError):
                saved = read_checkpoint(path)
                found[STATE, state.step] = max(_gap(saved.get(key), now[key]) for key in now)
        if say is not None:
            say(done + 1, count)
    run.write("end", run.meter.take_updates())
    return found


def _compared(
    first: Numbers, second: Numbers, states: Numbers, tolerance: float
) -> tuple[list[Compared], str | None]:
    """Rows of the table, and the first update that differs."""
    # The rate is known of every update here, but there only of those with a line of their own.
    keys = first.keys() | {key for key in second if key[0] != RATE}
    gaps = {key: _gap(first.get(key), second.get(key)) for key in keys} | states
    rows: dict[str, Compared] = {}
    wrong: dict[int, list[str]] = {}
    for (what, update), gap in sorted(gaps.items(), key=lambda item: item[0][::-1]):
        row = rows.setdefault(what, Compared(what))
        row.count += 1
        if gap > row.largest:
            row.largest, row.update = gap, update
        if gap > tolerance:
            pair = (_said(numbers.get((what, update))) for numbers in (first, second))
            text = what if what == STATE else f"{what} {' -> '.join(pair)}"
            wrong.setdefault(update, []).append(text)
    if not wrong:
        return list(rows.values()), None
    return list(rows.values()), f"update {min(wrong)}: {', '.join(wrong[min(wrong)])}"


def _said(value: float | None) -> str:
    return "none" if value is None else f"{value:.9g}"


def _gap(a: Any, b: Any) -> float:
    """Largest relative difference in two nests; infinite where they are built differently."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _tensor_gap(a.detach().cpu(), b.detach().cpu())
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if a.keys() != b.keys():
            return math.inf
        return max((_gap(a[key], b[key]) for key in a), default=0.0)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return math.inf
        return max((_gap(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
    if isinstance(a, float) and isinstance(b, float):
        return _tensor_gap(*(torch.tensor(v, dtype=torch.float64) for v in (a, b)))
    return 0.0 if a == b else math.inf


def _tensor_gap(a: Tensor, b: Tensor) -> float:
    """Largest |a - b|, relative to the largest of both."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    same = (a == b) | ((a != a) & (b != b))
    if bool(same.all()):
        return 0.0
    if not a.is_floating_point():
        return math.inf
    gap = (a.double() - b.double()).abs().max() / torch.maximum(a.abs().max(), b.abs().max())
    return gap.item() if math.isfinite(gap) else math.inf
