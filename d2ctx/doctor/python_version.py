"""The oldest Python that works. This file, unlike all others, also runs on older ones."""

OLDEST = (3, 11)
COMMAND = "make clean setup PYTHON=python3.12"


def complaint(version):
    """Return what is wrong with a Python version and the command that mends it, or None.

    Args:
        version: Major, minor and micro number.
    """
    if tuple(version[:2]) >= OLDEST:
        return None
    wanted = ".".join(str(part) for part in OLDEST)
    got = ".".join(str(part) for part in version)
    return f"expected Python {wanted} or newer, got {got}", COMMAND
