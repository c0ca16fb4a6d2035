"""Rehearsing without the logs of a run."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from d2ctx.compat import silence_notices

_NAMES = ("fvcore", "detectron2", "d2ctx")


@contextmanager
def quiet() -> Iterator[None]:
    """Let the logs of Detectron2 and ours go nowhere.

    Yields:
        Nothing.
    """
    loggers = [logging.getLogger(name) for name in _NAMES]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        # Detectron2's trainer would set up a terminal where its logger is off.
        logger.handlers, logger.propagate = [logging.NullHandler()], False
        logger.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            silence_notices()
            yield
    finally:
        for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
