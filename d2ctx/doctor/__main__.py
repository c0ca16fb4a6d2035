"""`python -m d2ctx.doctor`: see `d2ctx.doctor.cli`."""

import sys

from d2ctx.doctor.python_version import complaint


def start():
    """Run the doctor, or say that this Python is too old; older ones must understand this file."""
    problem = complaint(tuple(sys.version_info[:3]))
    if problem:
        print("problem: " + "\n  ".join(problem))
        return 1
    from d2ctx.doctor.cli import main

    return main()


if __name__ == "__main__":
    raise SystemExit(start())
