"""The sub-commands of `segtrain data`; each imports what it runs only when it runs."""

import argparse
import sys
from pathlib import Path

from segtrain.data.inspect_commands import add_check, add_prepare, add_show, add_stats

_PLAIN_STEP = 500  # images between two progress lines when stderr is not a terminal

_SYNTH_EPILOG = """formats:
  coco            images/, annotations/instances_{train,val}.json with exact masks
  coco-panoptic   the same, annotations/panoptic_{train,val}.json and their PNG folders,
                  semantic_{train,val}/ with one category id per pixel
  folder          images/{train,val}/, masks/{train,val}/ with class numbers, classes.txt

tasks (format folder, square, 64 pixels unless said otherwise):
TASKS

The same seed gives the same files. Running the same command again changes nothing.

examples:
  segtrain data synth --out scenes --format coco --num 200 --seed 0
  segtrain data synth --out wide --format coco-panoptic --num 40 --size 384x256 --workers 2
  segtrain data synth --out masks --format folder --num 400 --val-fraction 0.1
  segtrain data synth --out far --task far --num 2000
"""


# What `--help` says; the tasks themselves are not imported for it.
_TASKS = {
    "far": "the colour of a ring in a far corner is the class of all discs",
    "whole": "the direction of broad waves around a disc is the class of the dots on it",
    "detail": "lines of one pixel in its core are the class of a large disc",
    "boundary": "one object with a wavy outline",
    "scene": "whether the colours of squares and stars go together is the class of all discs",
    "local": "a control: the discs wear the colour of their class",
}


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `data` and its sub-commands.

    Args:
        commands: the sub-parsers of the main parser.
    """
    data = commands.add_parser("data", help="make and inspect data sets")
    parts = data.add_subparsers(metavar="COMMAND", required=True)
    for add in (add_synth, add_check, add_stats, add_show, add_prepare):
        add(parts)


def add_synth(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `data synth`.

    Args:
        commands: the sub-parsers of `data`.
    """
    told = (f"  {name:15} {about}" for name, about in _TASKS.items())
    parser = commands.add_parser(
        "synth",
        help="draw scenes with exact semantic, instance and panoptic truth",
        description="Draw scenes of textured shapes with exact ground truth.",
        epilog=_SYNTH_EPILOG.replace("TASKS", "\n".join(told)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="directory to make")
    parser.add_argument(
        "--format",
        choices=("coco", "coco-panoptic", "folder"),
        help="layout (default: coco; folder for tasks)",
    )
    parser.add_argument(
        "--task",
        choices=tuple(_TASKS),
        help="instead of scenes, small images whose answer needs one mechanism",
    )
    parser.add_argument("--num", type=int, required=True, metavar="N", help="number of images")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed (default: 0)")
    parser.add_argument(
        "--size", type=_size, metavar="SIDE|WxH", help="pixels (default: 256; 64 for tasks)"
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=0.25,
        metavar="F",
        help="share of validation images (default: 0.25, every fourth)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="W",
        help="processes; 0 draws in this one (default: 0)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace another synthetic data set in DIR"
    )
    parser.set_defaults(run=run_synth)


def run_synth(args: argparse.Namespace) -> int:
    """Run `data synth`.

    Args:
        args: parsed arguments.

    Returns:
        Exit code 0.

    Raises:
        ValueError: for anything the user can correct.
    """
    if args.task:
        return _run_task(args)
    from segtrain.data.synthetic.writers import holds_request, write_dataset

    request = {
        "out": args.out,
        "fmt": args.format or "coco",
        "num": args.num,
        "seed": args.seed,
        "size": args.size or (256, 256),
        "val_fraction": args.val_fraction,
    }
    if not args.overwrite and holds_request(**request):
        print(f"already there: {args.out}")
        return 0
    line = _ProgressLine()
    try:
        out = write_dataset(
            **request, workers=args.workers, overwrite=args.overwrite, progress=line.show
        )
    finally:
        line.close()
    _print_written(args, request["fmt"], out)
    return 0


def _run_task(args: argparse.Namespace) -> int:
    """Run `data synth --task`."""
    from segtrain.data.synthetic.tasks.writer import holds_task, write_task

    width, height = args.size or (64, 64)
    if args.format not in (None, "folder"):
        raise ValueError(f"--task: expected --format folder, got {args.format}; leave it out")
    if width != height:
        raise ValueError(f"--task: expected a square, got {width}x{height}; use --size {width}")
    if args.workers:
        raise ValueError(f"--task: expected no --workers, got {args.workers}; leave it out")
    request = {
        "out": args.out,
        "task": args.task,
        "num": args.num,
        "seed": args.seed,
        "side": width,
        "val_fraction": args.val_fraction,
    }
    if not args.overwrite and holds_task(**request):
        print(f"already there: {args.out}")
        return 0
    line = _ProgressLine()
    try:
        out = write_task(**request, overwrite=args.overwrite, progress=line.show)
    finally:
        line.close()
    _print_written(args, args.task, out)
    return 0


def _print_written(args: argparse.Namespace, kind: str, out: Path) -> None:
    from segtrain.data.synthetic.writers import split_of

    num_val = sum(
        split_of(index=k, val_fraction=args.val_fraction) == "val" for k in range(args.num)
    )
    print(f"wrote {args.num - num_val} train and {num_val} val images ({kind}) to {out}")


class _ProgressLine:
    """One line that counts up on a terminal, a plain line now and then elsewhere."""

    def __init__(self) -> None:
        self._open = False

    def show(self, done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\rdrawing {done}/{total}", end="", file=sys.stderr, flush=True)
            self._open = True
        elif done % _PLAIN_STEP == 0 and done < total:
            print(f"drawing {done}/{total}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._open:
            print(file=sys.stderr)


def _size(text: str) -> tuple[int, int]:
    """Parse "256" or "384x256" into width and height."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(p.isdecimal() for p in parts):
        raise argparse.ArgumentTypeError(f"expected SIDE or WxH like 256 or 384x256, got {text!r}")
    return int(parts[0]), int(parts[-1])
