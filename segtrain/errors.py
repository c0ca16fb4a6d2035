"""The errors that the `segtrain` command turns into an exit code instead of a traceback."""

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: run the same command again


class UserError(ValueError):
    """Something only the user can mend: says what was expected, what came, and the fix.

    One problem is one line; several are a line that counts them and a line each.
    """


class Interrupted(Exception):  # noqa: N818, it is no error
    """A run stopped by a signal after it had saved its state; the command exits with `REQUEUE`."""
