"""Asking a run to stop: SIGTERM of a scheduler, Ctrl-C of a user."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from segtrain.errors import Interrupted


class StopRequest:
    """While entered, the first SIGTERM or SIGINT is only noted; a second one acts as usual.

    Outside the main thread, where Python allows no handlers, nothing is caught.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.name: str | None = None
        self._message: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return self.name is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in self.SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    @contextmanager
    def at_once(self, message: str) -> Iterator[None]:
        """Stop the body right away, because nothing in it needs to be finished.

        Args:
            message: Of the exception.

        Raises:
            Interrupted: In the body, when the signal comes.
        """
        self._message = message
        try:
            yield
        finally:
            self._message = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self._restore()
        if self._message is not None:
            raise Interrupted(self._message)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
