"""The sub-commands `train`, `resume` and `replay`; torch is loaded only when they run."""

import argparse
import json
from pathlib import Path
from typing import Any

from segtrain.config.commands import add_overrides

_TRAIN_EPILOG = """examples:
  segtrain train --config configs/seg/segmenter/seg_tiny_instant.yaml
  segtrain train --config my.yaml train.iters=2000 optim.lr=5e-4 output=output/short
  torchrun --nproc-per-node 4 -m segtrain train --config my.yaml

exit codes: 0 done, 2 something you can mend, 75 stopped by SIGTERM or Ctrl-C after saving
(run `segtrain resume RUN`)
"""

_RESUME_EPILOG = """examples:
  segtrain resume output/my
  torchrun --nproc-per-node 4 -m segtrain resume output/my

The configuration must be the one of the run; only where data lie, workers, what is logged and kept,
and train.on_nonfinite may be changed in RUN/config.yaml.

  segtrain resume output/my --prove 20
makes 20 updates after an older checkpoint again, without changing the run, and compares them with
its journal.

exit codes: as of train; with --prove 0 the same, 1 not the same
"""

_REPLAY_EPILOG = """examples:
  segtrain replay output/my/nonfinite/step_00001234.pt

exit codes: 0 it happened again, 1 all was finite this time
"""


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `train`, `resume` and `replay`.

    Args:
        commands: the sub-parsers of the main parser.
    """
    train = commands.add_parser(
        "train",
        help="train a model",
        description="Train a model as a configuration says, into a new run folder.",
        epilog=_TRAIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("--config", required=True, metavar="YAML", help="configuration file")
    add_overrides(train)
    train.add_argument("--json", action="store_true", help="print the results as JSON")
    train.set_defaults(run=run_train)
    resume = commands.add_parser(
        "resume",
        help="go on with a run",
        description="Go on with a run from its newest checkpoint, exactly as if it never stopped.",
        epilog=_RESUME_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    resume.add_argument("folder", type=Path, metavar="RUN", help="output folder of the run")
    resume.add_argument(
        "--prove", type=int, metavar="K", help="make K updates again and compare; changes nothing"
    )
    resume.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="relative difference that counts as the same, with --prove "
        "(default: 0 on a CPU, 1e-3 on a GPU)",
    )
    resume.add_argument("--json", action="store_true", help="print the results as JSON")
    resume.set_defaults(run=run_resume)
    _add_replay(commands)


def _add_replay(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    replay = commands.add_parser(
        "replay",
        help="find the module where NaN or infinity arises",
        description="Make an update again that was not finite, and name the first module.",
        epilog=_REPLAY_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    replay.add_argument(
        "file", type=Path, metavar="FILE", help="black box, RUN/nonfinite/step_XXXXXXXX.pt"
    )
    replay.add_argument("--json", action="store_true", help="print the result as JSON")
    replay.set_defaults(run=run_replay)


def run_train(args: argparse.Namespace) -> int:
    """Run `train`.

    Args:
        args: parsed arguments.

    Returns:
        Exit code 0.

    Raises:
        ValueError: for anything the user can correct.
    """
    from segtrain.config.load import load_config
    from segtrain.train.parts import build_parts
    from segtrain.train.start import train

    config = load_config(args.config, args.overrides)
    _say(train(config, build=build_parts), Path(config.output), as_json=args.json)
    return 0


def run_resume(args: argparse.Namespace) -> int:
    """Run `resume`.

    Args:
        args: parsed arguments.

    Returns:
        Exit code 0; with --prove 1 where something differs.

    Raises:
        ValueError: for anything the user can correct.
    """
    from segtrain.errors import UserError
    from segtrain.train.parts import build_parts
    from segtrain.train.start import resume

    if args.prove is not None:
        return _prove(args)
    if args.tolerance is not None:
        raise UserError("--tolerance is of --prove; write --prove 20, or leave it out")
    _say(resume(args.folder, build=build_parts), args.folder, as_json=args.json)
    return 0


def _prove(args: argparse.Namespace) -> int:
    from segtrain import dist
    from segtrain.train.parts import build_parts
    from segtrain.train.prove import prove

    proof = prove(args.folder, args.prove, build=build_parts, tolerance=args.tolerance)
    _print(proof, as_json=args.json, silent=not dist.is_main())
    return 0 if proof.differs is None else 1


def run_replay(args: argparse.Namespace) -> int:
    """Run `replay`.

    Args:
        args: parsed arguments.

    Returns:
        Exit code 0; 1 where all was finite this time.

    Raises:
        ValueError: for anything the user can correct.
    """
    from segtrain.train.parts import build_parts
    from segtrain.train.replay import replay

    found = replay(args.file, build=build_parts)
    _print(found, as_json=args.json)
    return 0 if found.reproduced else 1


def _print(result: Any, *, as_json: bool, silent: bool = False) -> None:
    """Print what has a `text()` and an `as_dict()`."""
    from segtrain.files import plain

    if not silent:
        print(json.dumps(plain(result.as_dict())) if as_json else result.text())


def _say(results: dict, folder: Path, *, as_json: bool) -> None:
    """Print results once, whatever the number of processes."""
    from segtrain import dist
    from segtrain.files import plain

    if not dist.is_main():
        return
    if as_json:
        print(json.dumps(plain(results)))
        return
    best = results["best"]
    print(
        f"mIoU {results['miou']:.4f} after {results['step']} updates, best {best['miou']:.4f} "
        f"after {best['step']}; weights in {folder / 'checkpoints'}"
    )
