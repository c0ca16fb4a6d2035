"""The `segtrain` command: every module of commands adds its parsers; this file runs them."""

import argparse
import io
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from segtrain import __version__
from segtrain.errors import REQUEUE, Interrupted

# Modules with a function `add_commands`; they import what they run only when they run it.
COMMANDS = (
    "segtrain.data.commands",
    "segtrain.config.commands",
    "segtrain.weights.commands",
    "segtrain.train.commands",
    "segtrain.plan.commands",
    "segtrain.evaluation.commands",
    "segtrain.curves",
    "segtrain.doctor",
)
# Import names of the packages that come with the extra `seg`.
_EXTRA = {
    "cityscapesscripts",
    "cv2",
    "matplotlib",
    "pydantic",
    "rich",
    "safetensors",
    "timm",
    "yaml",
}

_EPILOG = """examples:
  segtrain doctor
  segtrain data synth --out scenes --format folder --num 200 --seed 0
  segtrain config show my.yaml optim.lr=1e-3
  segtrain plan --config my.yaml
  segtrain train --config my.yaml optim.lr=1e-3

exit codes: 0 done, 2 something you can mend, 75 interrupted after saving (run it again),
130 interrupted
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
    parser.add_argument(
        "--traceback", action="store_true", help="show where in the program an error arose"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in COMMANDS:
        import_module(module).add_commands(commands)
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; `KEY=VALUE` may stand before and after options.

    Args:
        argv: Arguments without the program name; None takes those of the process.

    Returns:
        The parsed arguments.
    """
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    # argparse closes a list of positionals at the first option that follows it.
    if rest and (not hasattr(args, "overrides") or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program name; None takes those of the process.

    Returns:
        Exit code: 0 done, 2 wrong use (said on stderr without a traceback), 75 interrupted after
        saving, 130 interrupted.
    """
    args = parse(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # File names may be no Unicode; they shall be shown all the same.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        return _failed(error, show=args.traceback)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        text = f"the package {error.name} is missing; run: pip install 'ctxseg[seg]'"
        return _failed(text, show=args.traceback)
    except Interrupted as stop:
        print(f"segtrain: {stop}", file=sys.stderr)
        return REQUEUE
    except KeyboardInterrupt:
        print("segtrain: interrupted", file=sys.stderr)
        return 130


def _failed(problem: object, *, show: bool) -> int:
    if show:
        traceback.print_exc()
    print(f"segtrain: error: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
