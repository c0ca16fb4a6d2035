"""Whether a resumed run repeats what the first one did: some updates again, number by number."""

import re
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm

from d2ctx.errors import Interrupted, UserError
from d2ctx.files import write_text
from d2ctx.recovery.checkpoints import TAG, checkpoint_files
from d2ctx.recovery.journal import NAME, Record, read_journal
from d2ctx.runs import start_run
from d2ctx.trainer import Trainer
from d2ctx.wording import first_of, plural

_ITERATION = re.compile(r"model_(\d+)")


def prove(cfg: CfgNode, updates: int) -> bool:
    """Repeat updates of a run from a checkpoint, and compare losses and learning rates.

    The run's folder is only read. All processes call it.

    Args:
        cfg: Of the run, whose folder is `OUTPUT_DIR`.
        updates: How many.

    Returns:
        Whether every number is the same. The main process prints what was found.

    Raises:
        UserError: If no checkpoint is followed by so many updates in the journal.
    """
    journal = read_journal(Path(cfg.OUTPUT_DIR))
    checkpoint, first = _start(Path(cfg.OUTPUT_DIR), journal, updates)
    then = first[:updates]
    now = _repeat(cfg, checkpoint, updates)
    if not comm.is_main_process():
        return True
    differing = differences(then, now)
    last = then[-1]["iteration"]
    what = f"{plural(updates, 'update')} from {checkpoint.name}, up to iteration {last}"
    if not differing:
        print(f"exact: {what}, have the same losses and learning rates as in {NAME}")
        return True
    print(f"not exact: {what}: {first_of(differing)}")
    return False


def differences(then: Sequence[Record], now: Sequence[Record]) -> list[str]:
    """What differs between two records of the same updates, in words.

    Args:
        then: Of the run.
        now: Of its repetition.

    Returns:
        A phrase for each number; none where all are equal.
    """
    found = []
    for i, old in enumerate(then):
        new = now[i] if i < len(now) else {}
        ours, theirs = _numbers(new), _numbers(old)
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                was, came = theirs.get(name), ours.get(name)
                found.append(f"iteration {old['iteration']}: {name} was {was}, is {came}")
    return found


def _numbers(record: Record) -> dict[str, Any]:
    kept = {key: value for key, value in record.items() if key in {"iteration", "lr", "event"}}
    return {**kept, **record.get("losses", {})}


def _start(folder: Path, journal: list[Record], updates: int) -> tuple[Path, list[Record]]:
    """The newest checkpoint that is followed by so many updates, and these."""
    longest = 0
    for path in checkpoint_files(folder):
        found = _ITERATION.fullmatch(path.stem)
        after = _following(journal, int(found[1])) if found else []
        if len(after) >= updates:
            return path, after
        longest = max(longest, len(after))
    fix = "set --prove to that" if longest else "write a smaller SOLVER.CHECKPOINT_PERIOD next time"
    raise UserError(
        f"expected a checkpoint in {folder} with {plural(updates, 'update')} behind it in {NAME}, "
        f"got at most {longest}; {fix}, or let the run train on"
    )


def _following(journal: list[Record], iteration: int) -> list[Record]:
    """Updates that follow an iteration without a gap, a failure or a step back."""
    found: list[Record] = []
    for record in journal:
        if record["iteration"] == iteration + 1 + len(found):
            if "event" in record:
                break
            found.append(record)
    return found


def _repeat(cfg: CfgNode, checkpoint: Path, updates: int) -> list[Record]:
    """The updates behind a checkpoint, in a folder of their own that is removed."""
    with ExitStack() as stack:
        folder = None
        if comm.is_main_process():
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="d2ctx_prove_"))
            Path(folder, checkpoint.name).symlink_to(checkpoint.absolute())
            write_text(Path(folder, TAG), checkpoint.name)
        folder = comm.all_gather(folder)[0]
        cfg = cfg.clone()
        cfg.defrost()
        cfg.OUTPUT_DIR = folder
        cfg.freeze()
        start_run(cfg)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=True)
        try:
            trainer.repeat(updates)
        except Interrupted:
            raise Interrupted("stopped by a signal; the run is as it was") from None
        comm.synchronize()
        return read_journal(Path(folder))
