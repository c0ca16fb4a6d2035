"""Asking a run to stop: SIGTERM of a scheduler, Ctrl-C of a user, on to the processes it started.

Handlers only set a flag, which training looks at between two iterations.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from d2ctx.errors import Interrupted

ASKED = (signal.SIGTERM, signal.SIGINT)
# How a parent tells its processes. They may have got the user's signal as well, and a second one
# of those would end them at once.
_PASSED_ON = getattr(signal, "SIGUSR1", None)


class StopRequest:
    """While entered, the first SIGTERM or SIGINT is only noted; a second one acts as usual.

    Outside the main thread, where Python allows no handlers, nothing is caught.

    Attributes:
        name: Of the signal that came; None before.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._message: str | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._passed_on: Any = None

    def __bool__(self) -> bool:
        return self.name is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in ASKED}
            if _PASSED_ON is not None:
                self._passed_on = signal.signal(_PASSED_ON, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()
        if self._passed_on is not None:
            signal.signal(_PASSED_ON, self._passed_on)
            self._passed_on = None

    @contextmanager
    def at_once(self, message: str) -> Iterator[None]:
        """Give up the body as soon as the signal comes: nothing in it needs to be finished.

        Args:
            message: Of the exception.

        Yields:
            Nothing.

        Raises:
            Interrupted: In the body.
        """
        if self:
            raise Interrupted(message)
        self._message = message
        try:
            yield
        finally:
            self._message = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
        self._restore()
        if self._message is not None:
            raise Interrupted(self._message)

    def _restore(self) -> None:
        """Let the user's next signal act as usual, but never what a parent passes on."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


@contextmanager
def passed_on() -> Iterator[None]:
    """Let the processes started in the body finish their iteration when this one is to stop.

    Yields:
        Nothing.
    """

    def pass_on(number: int, frame: FrameType | None) -> None:
        for asked, handler in before.items():
            signal.signal(asked, handler)
        for child in multiprocessing.active_children():
            os.kill(child.pid, _PASSED_ON)

    if _PASSED_ON is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {asked: signal.signal(asked, pass_on) for asked in ASKED}
    try:
        yield
    finally:
        for asked, handler in before.items():
            signal.signal(asked, handler)
