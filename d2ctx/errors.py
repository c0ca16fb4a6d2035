"""The one exception that the command-line programs turn into a single line and exit code 2."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Something only the user can mend: says what was expected, what came, and the fix."""


def exit_code(program: Callable[[], object]) -> int:
    """Run a command-line program; a user error becomes one message on stderr, without traceback.

    Args:
        program: What to run.

    Returns:
        0, or 2 after a user error.
    """
    try:
        program()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
