"""`segtrain data check|stats|show|prepare`; each imports what it runs only when it runs."""

import argparse
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from segtrain.config.data import DataConfig
    from segtrain.config.schema import RunConfig
    from segtrain.data.check import SplitReport

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_DATASETS = (
    "cityscapes",
    "ade20k",
    "context59",
    "context60",
    "voc",
    "lip",
    "camvid",
    "folder",
)
# A configuration around a data set that was named on the command line.
_FRAME = """
data: {dataset: %s, root: %s, crop: [512, 512], base_size: [2048, 512]}
model: {name: segmenter, variant: Ti}
optim: {lr: 1.0e-3}
train: {iters: 1000, global_batch: 8}
"""
_SOURCE_HELP = """
The data set is the one of a configuration, or --dataset and --root name it. KEY=VALUE goes over
the configuration, for example data.folder.binary=true.
"""
_CHECK_EPILOG = (
    _SOURCE_HELP
    + """
exit codes: 0 nothing to mend, 2 something to mend

examples:
  segtrain data check configs/seg/mine.yaml
  segtrain data check --dataset camvid --root ~/data/camvid
  segtrain data check --dataset folder --root scans data.folder.binary=true --json
"""
)
_STATS_EPILOG = (
    _SOURCE_HELP
    + """
examples:
  segtrain data stats configs/seg/mine.yaml
  segtrain data stats --dataset camvid --root ~/data/camvid --split val --json
"""
)
_SHOW_EPILOG = (
    _SOURCE_HELP
    + """
examples:
  segtrain data show --dataset camvid --root ~/data/camvid --out pictures
  segtrain data show configs/seg/mine.yaml --augment --num 6 --out pictures
"""
)
_PREPARE_EPILOG = """
examples:
  segtrain data prepare cityscapes --root ~/data/cityscapes
  segtrain data prepare context --root ~/data/VOCdevkit/VOC2010 --raw ~/data/context
"""


def add_check(commands: "Commands") -> None:
    """Add `data check`.

    Args:
        commands: The sub-parsers of `data`.
    """
    parser = _parser(commands, "check", "find what is wrong with images and labels", _CHECK_EPILOG)
    _add_source(parser)
    parser.add_argument(
        "--headers", action="store_true", help="do not decode files: sizes and pairs only"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, every file included")
    parser.set_defaults(run=run_check)


def add_stats(commands: "Commands") -> None:
    """Add `data stats`.

    Args:
        commands: The sub-parsers of `data`.
    """
    parser = _parser(commands, "stats", "count classes, sizes and pixel values", _STATS_EPILOG)
    _add_source(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run_stats)


def add_show(commands: "Commands") -> None:
    """Add `data show`.

    Args:
        commands: The sub-parsers of `data`.
    """
    parser = _parser(commands, "show", "draw labels over images", _SHOW_EPILOG)
    _add_source(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the pictures")
    parser.add_argument("--num", type=int, default=8, metavar="N", help="images (default: 8)")
    parser.add_argument("--augment", action="store_true", help="add two training crops of each")
    parser.set_defaults(run=run_show)


def add_prepare(commands: "Commands") -> None:
    """Add `data prepare`.

    Args:
        commands: The sub-parsers of `data`.
    """
    parser = _parser(commands, "prepare", "write training ids of raw downloads", _PREPARE_EPILOG)
    parser.add_argument("dataset", choices=("cityscapes", "context"), help="which download")
    parser.add_argument("--root", required=True, metavar="DIR", help="folder of the data set")
    parser.add_argument(
        "--raw", metavar="DIR", help="context: folder of labels.txt and the .mat files"
    )
    parser.set_defaults(run=run_prepare)


def run_check(args: argparse.Namespace) -> int:
    """Run `data check`.

    Args:
        args: Parsed arguments.

    Returns:
        Exit code: 0 nothing to mend, 2 something to mend.

    Raises:
        UserError: If the data set cannot be looked at.
    """
    from segtrain.data.check import check_layout
    from segtrain.data.datasets import build_layout

    config = _run_config(args).data
    layout = build_layout(config)
    reports = check_layout(
        layout, _splits(args, config), decode=not args.headers, progress=_progress("checking")
    )
    if args.json:
        print(json.dumps({"dataset": layout.name, "splits": [r.as_json() for r in reports]}))
    else:
        print("\n".join(line for report in reports for line in _report_lines(report)))
    return 2 if any(report.errors for report in reports) else 0


def run_stats(args: argparse.Namespace) -> int:
    """Run `data stats`.

    Args:
        args: Parsed arguments.

    Returns:
        Exit code 0.

    Raises:
        UserError: If there is anything to mend in the data.
    """
    from segtrain.data.check import check_layout, raise_errors
    from segtrain.data.datasets import build_layout
    from segtrain.data.stats import pixel_statistics, statistics_json, statistics_lines

    config = _run_config(args).data
    layout = build_layout(config)
    reports = check_layout(layout, _splits(args, config), progress=_progress("counting"))
    raise_errors(reports)
    pixels = [pixel_statistics(layout.samples(report.split)) for report in reports]
    pairs = list(zip(reports, pixels, strict=True))
    if args.json:
        splits = [statistics_json(report, layout, part) for report, part in pairs]
        print(json.dumps({"dataset": layout.name, "splits": splits}))
    else:
        print("\n".join(line for r, part in pairs for line in statistics_lines(r, layout, part)))
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Run `data show`.

    Args:
        args: Parsed arguments.

    Returns:
        Exit code 0.

    Raises:
        UserError: If a file cannot be read or written.
    """
    from pathlib import Path

    from segtrain.data.dataset import build_train_transform
    from segtrain.data.datasets import build_layout
    from segtrain.data.show import show

    run = _run_config(args)
    config = run.data
    layout = build_layout(config)
    transform = build_train_transform(config, layout) if args.augment else None
    for split in args.split or [config.train_split]:
        out = Path(args.out, split)
        written = show(
            layout, split, out=out, num=args.num, transform=transform, seed=run.train.seed
        )
        print(f"wrote {len(written)} pictures of {split} to {out}")
    return 0


def run_prepare(args: argparse.Namespace) -> int:
    """Run `data prepare`.

    Args:
        args: Parsed arguments.

    Returns:
        Exit code 0.

    Raises:
        UserError: If the download is incomplete or damaged.
    """
    from pathlib import Path

    from segtrain.data.prepare import prepare_cityscapes, prepare_context
    from segtrain.errors import UserError

    progress, root = _progress("preparing"), Path(args.root).expanduser()
    if args.dataset == "cityscapes":
        written = prepare_cityscapes(root, progress=progress)
    elif args.raw is None:
        raise UserError("prepare context needs --raw DIR, the folder of labels.txt")
    else:
        written = prepare_context(root, Path(args.raw).expanduser(), progress=progress)
    print(f"wrote {written} label maps below {root}")
    return 0


def _parser(commands: "Commands", name: str, text: str, epilog: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "items", nargs="*", metavar="FILE KEY=VALUE", help="configuration, then overrides"
    )
    parser.add_argument("--dataset", choices=_DATASETS, help="instead of a configuration")
    parser.add_argument("--root", metavar="DIR", help="where that data set lies")
    parser.add_argument(
        "--split",
        action="append",
        metavar="NAME",
        help="split to look at, may be repeated (default: those of the configuration)",
    )


def _run_config(args: argparse.Namespace) -> "RunConfig":
    """A file, or a frame around the data set on the command line."""
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from segtrain.config.load import load_config
    from segtrain.errors import UserError

    files = [item for item in args.items if "=" not in item]
    overrides = [item for item in args.items if "=" in item]
    if args.dataset is None and args.root is None:
        if len(files) != 1:
            raise UserError(
                f"expected one configuration, got {len(files)}; or --dataset and --root"
            )
        return load_config(files[0], overrides)
    if files or args.dataset is None or args.root is None:
        raise UserError("expected a configuration, or both --dataset and --root; not a mixture")
    with TemporaryDirectory() as folder:
        path = Path(folder, "command-line.yaml")
        path.write_text(_FRAME % (args.dataset, json.dumps(args.root)), encoding="utf-8")
        return load_config(path, overrides)


def _splits(args: argparse.Namespace, config: "DataConfig") -> list[str]:
    return args.split or [config.train_split, config.val_split]


def _report_lines(report: "SplitReport") -> list[str]:
    """One split as text."""
    lines = [
        f"{report.split}: {report.images} images, " + ("to mend:" if report.errors else "fine")
    ]
    lines += [f"  error: {error.text}" for error in report.errors]
    lines += [f"  note: {note}" for note in report.notes]
    for guess in report.guesses:
        lines.append(f"  looks like: {guess.text}")
        lines += [f"    {line}" for line in guess.yaml.splitlines()]
    return lines


def _progress(verb: str) -> Callable[[int, int], None]:
    """A line that counts up, on terminals only."""

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            print(f"\r{verb} {done}/{total}", end=end, file=sys.stderr, flush=True)

    return progress
