"""What a run does about an update that is not finite: `train.on_nonfinite`.

`stop` ends the run. `skip` leaves the update out and goes on with the next one; `SKIPS` in a row
end the run. `rewind` goes back to the newest checkpoint and sees the data in another order from
there; that, too, ends after `REWINDS` times. All processes decide together.
"""

from typing import TYPE_CHECKING

from segtrain.errors import UserError
from segtrain.train.blackbox import KEPT
from segtrain.train.checkpoint import load_checkpoint
from segtrain.train.guard import BrokenUpdate, Finding
from segtrain.train.meter import Meter
from segtrain.train.state import restore_generators

if TYPE_CHECKING:
    from segtrain.train.loop import Run

SKIPS, REWINDS = 10, 3
_FIX = (
    "lower optim.lr, set optim.clip_norm or schedule.warmup_iters, or write train.precision: fp32"
)
_FIX_DATA = "its images hold NaN or infinity, mend them (train.on_nonfinite: skip leaves them out)"


def recover(run: "Run", broken: BrokenUpdate, *, rate: float, rehearsing: bool) -> None:
    """Go on after a broken update, or end the run; a call of all processes.

    Args:
        run: Before the update.
        broken: What came of it.
        rate: Its learning rate.
        rehearsing: Whether to stop whatever the policy, and to leave no black box.

    Raises:
        UserError: If the run is to end.
    """
    reason = "" if rehearsing else _reason_to_stop(run)
    stopping = rehearsing or reason is not None
    boxes = 0 if rehearsing else None if stopping else KEPT
    finding = run.guard.look(broken, rate=rate, boxes=boxes)
    policy = "stop" if rehearsing else run.options.on_nonfinite
    if stopping:
        run.write("nonfinite", finding.record("stop"))
        raise UserError(f"{finding.text(_fix(finding))}{reason}{_see(finding)}")
    if policy == "skip":
        _skip(run, finding, rate)
    else:
        _rewind(run, finding)


def _reason_to_stop(run: "Run") -> str | None:
    """The end of the message where the run cannot go on, None where it can."""
    policy = run.options.on_nonfinite
    if policy == "stop":
        return "; the last checkpoint is from before"
    if policy == "skip":
        return f"; {SKIPS} in a row were skipped" if run.skipped + 1 >= SKIPS else None
    if run.state.rewinds >= REWINDS:
        return f"; went back {REWINDS} times before"
    return None if run.saved else "; there is no checkpoint yet to go back to"


def _skip(run: "Run", finding: Finding, rate: float) -> None:
    """Leave the update out: weights, optimizer and average stay, schedule and data go on."""
    run.skipped += 1
    run.state.step += 1
    run.write("nonfinite", finding.record("skip"))
    run.progress.note(f"{finding.text()}; skipped{_see(finding)}")
    run.report({}, rate)


def _rewind(run: "Run", finding: Finding) -> None:
    """Go back to the newest checkpoint, and on with other batches."""
    state, saved = run.state, load_checkpoint(run.folder)
    rewinds = state.rewinds + 1
    state.load_state_dict(saved)
    restore_generators(saved)
    state.rewinds, run.saved, run.batches = rewinds, state.step, None
    run.meter = Meter(run.device, images=run.options.global_batch)
    if run.journal is not None:
        run.journal.forget_after(state.step, evaluated=run.results["step"])
    run.write("nonfinite", {**finding.record("rewind"), "rewinds": rewinds})
    run.progress.note(f"{finding.text()}; back to update {state.step}{_see(finding)}")


def _fix(finding: Finding) -> str:
    return _FIX_DATA if finding.first is not None and finding.first.kind == "input" else _FIX


def _see(finding: Finding) -> str:
    if finding.problem:
        return f"; its black box could not be written ({finding.problem})"
    return "" if finding.box is None else f"; see: segtrain replay {finding.box}"
