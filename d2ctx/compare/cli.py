"""Command line of the comparison."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from d2ctx.compare.comparison import compare
from d2ctx.errors import exit_code

EPILOG = """examples:
  python -m d2ctx.compare output/fpn output/a2fpn
  python -m d2ctx.compare output/fpn output/a2fpn --metric segm --samples 10000
  python -m d2ctx.compare output/fpn output/a2fpn --dataset coco_2017_val --json

Every evaluation leaves what this needs, per_image_<task>.npz, beside its results.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Command-line entry; see `--help`.

    Args:
        argv: Arguments without the program name; None takes them from the process.

    Returns:
        0, or 2 after an error of use.
    """
    args = _parser().parse_args(argv)
    return exit_code(lambda: _print(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m d2ctx.compare",
        description=(
            "Is run B really better than run A? Differences of AP, PQ and mIoU on the same images, "
            "with 95 % intervals by a paired bootstrap over images."
        ),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", type=Path, metavar="RUN_A", help="output folder of an evaluated run")
    parser.add_argument("b", type=Path, metavar="RUN_B", help="the other")
    parser.add_argument("--dataset", metavar="NAME", help="which one, where runs have several")
    parser.add_argument(
        "--metric",
        nargs="+",
        default=[],
        metavar="TASK",
        help="bbox, segm, panoptic_seg, sem_seg (default: all that both have)",
    )
    parser.add_argument("--samples", type=int, default=1000, metavar="S", help="default: 1000")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (default: 0)")
    parser.add_argument("--json", action="store_true", help="print plain values as JSON")
    return parser


def _print(args: argparse.Namespace) -> None:
    found = compare(
        args.a,
        args.b,
        dataset=args.dataset,
        tasks=args.metric,
        samples=args.samples,
        seed=args.seed,
    )
    print(json.dumps(found.as_dict(), indent=2) if args.json else found.text())
