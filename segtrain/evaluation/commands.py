"""The sub-commands `eval`, `predict` and `submit`; what they run is imported only when they run."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segtrain.config.commands import add_overrides

if TYPE_CHECKING:
    from segtrain.evaluation.trained import Trained

_EVAL_EPILOG = """examples:
  segtrain eval output/my
  segtrain eval output/my --split test --json
  segtrain eval output/my 'eval.ratios=[0.5,0.75,1.0,1.25,1.5,1.75]' eval.flip=true
  segtrain eval my.yaml --weights converted.safetensors
  torchrun --nproc-per-node 4 -m segtrain eval output/my
"""
_PREDICT_EPILOG = """examples:
  segtrain predict output/my photo.jpg --out predictions
  segtrain predict output/my photos/ --out predictions --kinds labels overlays
  segtrain predict output/my drive.mp4 --out predictions
"""
_SUBMIT_EPILOG = """examples:
  segtrain submit cityscapes output/my --split val --out submission
  segtrain submit cityscapes output/my --split test --out submission eval.flip=true
  segtrain submit check submission.zip --root cityscapes --split test
"""
_RAW = argparse.RawDescriptionHelpFormatter
_LISTED = 50  # violations that are printed; --json lists all
Commands = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_commands(commands: Commands) -> None:
    """Add `eval`, `predict` and `submit`.

    Args:
        commands: the sub-parsers of the main parser.
    """
    _add_eval(commands)
    _add_predict(commands)
    submit = commands.add_parser("submit", help="write and check files for a benchmark server")
    tasks = submit.add_subparsers(metavar="COMMAND", required=True)
    _add_cityscapes(tasks)
    _add_check(tasks)


def _add_eval(commands: Commands) -> None:
    parser = commands.add_parser(
        "eval",
        help="score a model on a split",
        description="Score a model at the original size of the labels.",
        epilog=_EVAL_EPILOG,
        formatter_class=_RAW,
    )
    _add_model(parser)
    parser.add_argument("--split", metavar="NAME", help="default: data.val_split")
    parser.add_argument(
        "--size-statistic",
        choices=("component", "image"),
        default="component",
        help="area that ranks small, medium and large classes (default: component)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="JSON",
        help="file for the result; the counts of every image, for `runs compare`, go beside it "
        "(.npz), else into the run",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    add_overrides(parser)
    parser.set_defaults(run=run_eval)


def _add_predict(commands: Commands) -> None:
    parser = commands.add_parser(
        "predict",
        help="predict an image, a folder or a video",
        description="Write class numbers, overlays with a legend, and side-by-side pictures.",
        epilog=_PREDICT_EPILOG,
        formatter_class=_RAW,
    )
    _add_model(parser)
    parser.add_argument("input", type=Path, metavar="INPUT", help="image, folder or video")
    add_overrides(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to")
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=("labels", "overlays", "side_by_side"),
        default=["labels", "overlays", "side_by_side"],
        help="what to write (default: all)",
    )
    parser.add_argument(
        "--alpha", type=float, default=0.6, metavar="A", help="share of colour (default: 0.6)"
    )
    parser.set_defaults(run=run_predict)


def _add_cityscapes(commands: Commands) -> None:
    parser = commands.add_parser(
        "cityscapes",
        help="predict a split of Cityscapes for its server",
        description=(
            "Write label-id PNGs with the official names, check them against the rules of the "
            "server, pack them, and score them by cityscapesScripts where ground truth exists."
        ),
        epilog=_SUBMIT_EPILOG,
        formatter_class=_RAW,
    )
    _add_model(parser)
    parser.add_argument("--split", default="test", metavar="NAME", help="default: test")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder; the archive is DIR.zip"
    )
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")
    add_overrides(parser)
    parser.set_defaults(run=run_cityscapes)


def _add_check(commands: Commands) -> None:
    parser = commands.add_parser(
        "check",
        help="check results for the server of Cityscapes",
        description="List everything that the server of Cityscapes would refuse.",
        epilog=_SUBMIT_EPILOG,
        formatter_class=_RAW,
    )
    parser.add_argument("results", type=Path, metavar="DIR|ZIP", help="what would be sent")
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="of Cityscapes")
    parser.add_argument("--split", default="test", metavar="NAME", help="default: test")
    parser.add_argument("--json", action="store_true", help="print all violations as JSON")
    parser.set_defaults(run=run_check)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, metavar="RUN|YAML", help="run folder, or configuration file"
    )
    parser.add_argument(
        "--weights", metavar="best|last|FILE", help="default: the best of the run, else its last"
    )
    parser.add_argument("--device", metavar="NAME", help="default: a GPU where there is one")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="default: fp32"
    )


def _trained(args: argparse.Namespace, device: Any) -> "Trained":
    from segtrain.evaluation.trained import load_trained

    return load_trained(args.source, weights=args.weights, overrides=args.overrides, device=device)


def run_eval(args: argparse.Namespace) -> int:
    """Run `eval`.

    Args:
        args: parsed arguments.

    Returns:
        Exit code 0.

    Raises:
        ValueError: for anything the user can correct.
    """
    from segtrain import dist
    from segtrain.evaluation.evaluate import evaluate
    from segtrain.evaluation.trained import choose_device
    from segtrain.files import plain

    with dist.process_group() as own:
        device = own if dist.world_size() > 1 else choose_device(args.device)
        trained = _trained(args, device)
        split = args.split or trained.config.data.val_split
        counts_path = _counts_path(args, split)
        report = evaluate(
            trained.model,
            trained.layout,
            split,
            trained.config,
            device,
            statistic=args.size_statistic,
            precision=args.precision,
            json_path=args.out,
            counts_path=counts_path,
            progress=_Line("evaluating").show if dist.is_main() else None,
        )
        if dist.is_main():
            files = {"weights": trained.weights, "image_counts": counts_path}
            result = {**files, **report.as_dict()}
            print(json.dumps(plain(result), indent=2) if args.json else report.table())
            if counts_path is not None and not args.json:
                print(f"counts of every image: {counts_path}")
    return 0


def _counts_path(args: argparse.Namespace, split: str) -> Path | None:
    """Beside the result, else in the run; a folder that may not be changed gets none."""
    from segtrain.errors import UserError
    from segtrain.evaluation.compare import counts_name

    if args.out is not None:
        # Said before the work, not after it.
        if args.out.suffix == ".npz":
            raise UserError(f"{args.out} would hold JSON; give --out another ending than .npz")
        if not args.out.parent.is_dir():
            raise UserError(f"no folder {args.out.parent} for --out; make it first")
        return args.out.with_suffix(".npz")
    writable = args.source.is_dir() and os.access(args.source, os.W_OK)
    return args.source / counts_name(split) if writable else None


def run_predict(args: argparse.Namespace) -> int:
    """Run `predict`.

    Args:
        args: parsed arguments.

    Returns:
        Exit code 0.

    Raises:
        ValueError: for anything the user can correct.
    """
    from segtrain.evaluation.trained import choose_device
    from segtrain.predict import Predictor, left_out
    from segtrain.wording import first_of, plural

    trained = _trained(args, choose_device(args.device))
    predictor = Predictor(
        trained.inferencer(precision=args.precision),
        trained.layout.classes,
        args.out,
        kinds=args.kinds,
        alpha=args.alpha,
    )
    done = predictor.run(args.input, _Line("predicting").show)
    print(f"wrote {', '.join(args.kinds)} of {done} pictures to {args.out}")
    if others := left_out(args.input):
        print(f"left out {plural(len(others), 'file')} of no known ending: {first_of(others)}")
    return 0


def run_cityscapes(args: argparse.Namespace) -> int:
    """Run `submit cityscapes`.

    Args:
        args: parsed arguments.

    Returns:
        Exit code 0; 2 where the server would refuse the files.

    Raises:
        ValueError: for anything the user can correct.
    """
    from segtrain.evaluation.submission import submit_cityscapes
    from segtrain.evaluation.trained import choose_device
    from segtrain.files import plain

    trained = _trained(args, choose_device(args.device))
    result = submit_cityscapes(
        trained,
        args.split,
        args.out,
        precision=args.precision,
        progress=_Line("predicting").show,
    )
    print(json.dumps(plain(result.as_dict()), indent=2) if args.json else result.text())
    return 2 if result.violations else 0


def run_check(args: argparse.Namespace) -> int:
    """Run `submit check`.

    Args:
        args: parsed arguments.

    Returns:
        Exit code 0; 2 where there are violations.

    Raises:
        ValueError: for anything the user can correct.
    """
    from segtrain.data.datasets import named_layout
    from segtrain.submit import image_sizes, violations
    from segtrain.wording import plural

    images = image_sizes(named_layout("cityscapes", args.root).samples(args.split))
    found = list(violations(args.results, images))
    if args.json:
        print(json.dumps({"images": len(images), "violations": found}, indent=2))
        return 2 if found else 0
    for line in found[:_LISTED]:
        print(line)
    if len(found) > _LISTED:
        print(f"and {len(found) - _LISTED} more, see --json")
    verdict = plural(len(found), "violation") if found else "valid"
    print(f"{args.results}: {verdict}, {plural(len(images), 'image')} in {args.split}")
    return 2 if found else 0


class _Line:
    """One line that counts up on a terminal, nothing elsewhere.

    Args:
        verb: What is done.
    """

    def __init__(self, verb: str) -> None:
        self.verb = verb

    def show(self, done: int, total: int | None) -> None:
        """Count.

        Args:
            done: Pictures so far.
            total: All of them, where that is known.
        """
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            count = f"{done}/{total}" if total else str(done)
            print(f"\r{self.verb} {count}", end=end, file=sys.stderr, flush=True)
