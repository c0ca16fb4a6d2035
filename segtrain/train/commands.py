"""The sub-commands `segtrain train` and `segtrain resume`; torch is loaded only when they run."""

import argparse
import json
from pathlib import Path

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

The configuration must be the one of the run; only where data lie, workers, and what is logged and
kept may be changed in RUN/config.yaml.
"""


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `train` and `resume`.

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
    resume.add_argument("--json", action="store_true", help="print the results as JSON")
    resume.set_defaults(run=run_resume)


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
        Exit code 0.

    Raises:
        ValueError: for anything the user can correct.
    """
    from segtrain.train.parts import build_parts
    from segtrain.train.start import resume

    _say(resume(args.folder, build=build_parts), args.folder, as_json=args.json)
    return 0


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
