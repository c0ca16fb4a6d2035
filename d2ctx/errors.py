"""The exceptions that the command-line programs turn into a single line and an exit code."""

import sys
from collections.abc import Callable

INTERRUPTED = 75  # sysexits.h: try again later


class UserError(ValueError):
    """Something only the user can mend: says what was expected, what came, and the fix."""


class Interrupted(Exception):  # noqa: N818 (it is no error)
    """A signal asked the run to stop; the message says how to go on."""


def exit_code(program: Callable[[], object]) -> int:
    """Run a command-line program; a user error becomes one message on stderr, without traceback.

    Args:
        program: What to run.

    Returns:
        0, 2 after a user error, or 75 where a signal stopped a run that can go on.
    """
    try:
        program()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return INTERRUPTED
    return 0
