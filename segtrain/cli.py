"""The `segtrain` command: one function per sub-command adds its parser and its handler."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from segtrain import __version__
from segtrain.data.commands import add_data_commands

_EPILOG = """examples:
  segtrain data synth --out scenes --format coco --num 200 --seed 0
  segtrain data synth --help
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all sub-commands.

    Returns:
        A parser; after parsing, `run` on the result is the handler, a function of the arguments
        that returns the exit code.
    """
    parser = _Parser(
        prog="segtrain",
        description="Train and try semantic segmentation models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"segtrain {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_data_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program name; None takes those of the process.

    Returns:
        Exit code: 0 done, 2 wrong use (one line on stderr), 130 interrupted.
    """
    args = build_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except ValueError as error:
        print(f"segtrain: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("segtrain: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
