"""A watch over the processes of a run: where nobody comes further, it names who did not arrive.

The processes of a run meet at many places, and one that stops leaves all others waiting without a
word. Each counts the meetings it has gone to. A thread shows the count to the others through a
store, every few seconds, and looks at theirs; the processes themselves only add one to a number.
"""

import json
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import NamedTuple, Protocol

from segtrain.wording import plural

EXIT_CODE = 2
_LONGEST, _LOOKS = 5.0, 8  # seconds from look to look, and looks of a time-out
_GRACE = 3  # looks from the verdict to the end, for the others to read it


class Store(Protocol):
    """What is used of `torch.distributed.Store`."""

    def set(self, key: str, value: str) -> None:
        """Keep a value."""

    def get(self, key: str) -> bytes:
        """The value; waits until there is one."""

    def check(self, keys: list[str]) -> bool:
        """Whether all of these are there."""


class Sign(NamedTuple):
    """What a process says about itself.

    Attributes:
        meetings: Meetings it has gone to.
        signs: Everything it came to, meetings too.
        place: Where it was last.
    """

    meetings: int = 0
    signs: int = 0
    place: str = "the start"


class Watch:
    """Ends this process where none has come further for a time.

    Time counts only while this process itself runs: one that was suspended for an hour has not
    waited for an hour.

    Args:
        store: That all processes share.
        rank: Number of this process.
        world: Number of processes.
        patience: Seconds.
        end: Called with the exit code; it does not return.
    """

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        world: int,
        patience: float,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self.patience = patience
        self._store, self._rank, self._world, self._end = store, rank, world, end
        self._own, self._found = Sign(), [Sign()] * world
        self._answers, self._ending, self._decided = 0, False, False
        self._over = threading.Event()
        # Two, because a store that is frozen holds whoever asks it.
        self._threads = [
            threading.Thread(target=target, name="watch", daemon=True)
            for target in (self._ask_on, self._wait_on)
        ]

    def start(self) -> None:
        """Look from now on."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._over.set()
        for thread in self._threads:
            thread.join(timeout=_LONGEST)

    def came_to(self, place: str) -> None:
        """Note that this process goes on.

        Args:
            place: Where it is.
        """
        meetings, signs, _ = self._own
        self._own = Sign(meetings, signs + 1, place)

    def meets(self) -> None:
        """Note that this process goes to where it waits for all."""
        meetings, signs, place = self._own
        self._own = Sign(meetings + 1, signs + 1, place)

    @property
    def interval(self) -> float:
        """Seconds from look to look."""
        return min(_LONGEST, self.patience / _LOOKS)

    def gone(self) -> list[int]:
        """Ask who is still there; takes as long as the slowest may need to answer.

        Returns:
            Ranks of processes that are not; 0, where the store that it kept is not either.
        """
        missing = set(range(self._world)) - {self._rank}
        end = time.monotonic() + 2 * self.interval
        try:
            self._store.set("who", "")
            while missing and time.monotonic() < end:
                missing = {rank for rank in missing if not self._store.check([f"here{rank}"])}
                time.sleep(self.interval / 20)
        except RuntimeError:
            return [0]
        return sorted(missing)

    def _ask_on(self) -> None:
        """Tell the store about this process and ask it about all, again and again."""
        while not self._over.wait(self.interval):
            try:
                self._ask()
            except RuntimeError:  # of the network: who kept the store may be the one that is gone
                continue
            self._answers += 1

    def _ask(self) -> None:
        self._store.set(f"sign{self._rank}", json.dumps(self._own))
        if self._ending:
            self._store.set("verdict", "")
        for rank in set(range(self._world)) - {self._rank}:
            if self._store.check([f"sign{rank}"]):
                self._found[rank] = Sign(*json.loads(self._store.get(f"sign{rank}")))
        if self._store.check(["who"]):
            self._store.set(f"here{self._rank}", "")
        self._decided = self._store.check(["verdict"])

    def _wait_on(self) -> None:
        """End where nothing changes for too long."""
        known, answers, still, before = list(self._found), 0, 0.0, time.monotonic()
        while not self._over.wait(self.interval):
            self._found[self._rank] = self._own
            found, now = list(self._found), time.monotonic()
            # A thread that was late was suspended or the machine is busy, and so are the others.
            still += min(now - before, 2 * self.interval)
            if found != known:
                known, answers, still = found, self._answers, 0.0
            before = now
            if still > self.patience or self._decided:
                self._leave(found, answered=self._decided or self._answers > answers)
                return

    def _leave(self, found: Sequence[Sign], *, answered: bool) -> None:
        """Say what is known, and end."""
        self._ending, missing = True, absent(found)
        if self._over.wait(_GRACE * self.interval):  # for the others to read the verdict
            return  # this process ends by itself, and tells why
        if not answered:
            print(f"segtrain: error: {_no_answer(self.patience)}", file=sys.stderr)
        elif self._rank == min(set(range(self._world)) - set(missing), default=0):
            print(f"segtrain: error: {verdict(found, self.patience)}", file=sys.stderr)
        if self._rank in missing or not missing:
            print(f"process {self._rank} is here:\n{_main_stack()}", file=sys.stderr)
        sys.stderr.flush()
        for child in multiprocessing.active_children():  # a data worker that hangs would stay
            child.kill()
        self._end(EXIT_CODE)


def absent(found: Sequence[Sign]) -> list[int]:
    """The processes that have gone to the fewest meetings.

    Args:
        found: Of every process.

    Returns:
        Ranks; none where all have gone to as many.
    """
    went = [sign.meetings for sign in found]
    return [rank for rank, times in enumerate(went) if times == min(went) < max(went)]


def verdict(found: Sequence[Sign], patience: float) -> str:
    """One line about who did not arrive.

    Args:
        found: Of every process.
        patience: Seconds that were waited.

    Returns:
        Ranks, where they were last, where the others wait, and what to do.
    """
    missing, waited = absent(found), f"nothing has happened for {_duration(patience)}"
    fix = (
        "what it does is printed as well; if it is only slow, raise train.timeout_minutes, else "
        "go on from the last checkpoint with: segtrain resume RUN"
    )
    if not missing:
        places = " and ".join(sorted({sign.place for sign in found}))
        return f"no process comes further than {places}: {waited}; {fix}"
    waiting = next(sign for rank, sign in enumerate(found) if rank not in missing)
    lost = " and ".join(f"process {rank} (last seen at {found[rank].place})" for rank in missing)
    others = plural(len(found) - len(missing), "process")
    return f"{lost} did not arrive, {others} waited for it at {waiting.place}: {waited}; {fix}"


def lost(gone: Sequence[int]) -> str:
    """One line about processes that have ended.

    Args:
        gone: Their ranks.

    Returns:
        Who, why perhaps, and what to do.
    """
    who = " and ".join(f"process {rank}" for rank in gone)
    return (
        f"{who} ended before the run did, so all do; if it said nothing, it was killed, most "
        "often because memory was short: free some, then go on from the last checkpoint with: "
        "segtrain resume RUN"
    )


def _no_answer(patience: float) -> str:
    return (
        f"process 0 or its machine does not answer, and nothing has happened for "
        f"{_duration(patience)}; look at that machine, then go on from the last checkpoint with: "
        "segtrain resume RUN"
    )


def store_address() -> tuple[str, int]:
    """Where the processes of `torchrun` have their store."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def connected(*, rank: int, world: int, patience: float) -> Watch:
    """A watch with a connection of its own to the store of `torchrun`.

    Args:
        rank: Number of this process.
        world: Number of processes.
        patience: Seconds.

    Returns:
        The watch, started.
    """
    from torch.distributed import PrefixStore, TCPStore

    # Of its own, because calls on one connection wait for each other.
    store = TCPStore(*store_address(), timeout=timedelta(seconds=_LONGEST), wait_for_workers=False)
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    watch = Watch(PrefixStore(f"watch{start}", store), rank=rank, world=world, patience=patience)
    watch.start()
    return watch


def _main_stack() -> str:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame)) if frame is not None else ""


def _duration(seconds: float) -> str:
    return f"{seconds / 60:g} minutes" if seconds >= 60 else f"{seconds:g} seconds"
