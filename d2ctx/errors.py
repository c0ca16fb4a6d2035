"""The one exception that the command-line programs turn into a single line and exit code 2."""


class UserError(ValueError):
    """Something only the user can mend: the message says what was expected, what came, and the fix."""
