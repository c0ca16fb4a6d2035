"""The sub-commands of `segtrain data`; each imports what it runs only when it runs."""

import argparse
import sys

from segtrain.data.inspect_commands import add_check, add_prepare, add_show, add_stats

_PLAIN_STEP = 500  # images between two progress lines when stderr is not a terminal

_SYNTH_EPILOG = """formats:
  coco            images/, annotations/instances_{train,val}.json with exact masks
  coco-panoptic   the same, annotations/panoptic_{train,val}.json and their PNG folders,
                  semantic_{train,val}/ with one category id per pixel
  folder          images/{train,val}/, masks/{train,val}/ with class numbers, classes.txt

The same seed gives the same files. Running the same command again changes nothing.

examples:
  segtrain data synth --out scenes --format coco --num 200 --seed 0
  segtrain data synth --out wide --format coco-panoptic --num 40 --size 384x256 --workers 2
  segtrain data synth --out masks --format folder --num 400 --val-fraction 0.1
"""


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
    parser = commands.add_parser(
        "synth",
        help="draw scenes with exact semantic, instance and panoptic truth",
        description="Draw scenes of textured shapes with exact ground truth.",
        epilog=_SYNTH_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="directory to make")
    parser.add_argument(
        "--format",
        choices=("coco", "coco-panoptic", "folder"),
        default="coco",
        help="layout (default: coco)",
    )
    parser.add_argument("--num", type=int, required=True, metavar="N", help="number of images")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed (default: 0)")
    parser.add_argument(
        "--size", type=_size, default=(256, 256), metavar="SIDE|WxH", help="pixels (default: 256)"
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
    from segtrain.data.synthetic.writers import holds_request, split_of, write_dataset

    request = {
        "out": args.out,
        "fmt": args.format,
        "num": args.num,
        "seed": args.seed,
        "size": args.size,
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
    num_val = sum(
        split_of(index=k, val_fraction=args.val_fraction) == "val" for k in range(args.num)
    )
    print(f"wrote {args.num - num_val} train and {num_val} val images ({args.format}) to {out}")
    return 0


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
