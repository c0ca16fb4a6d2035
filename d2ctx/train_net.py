"""Training and evaluation from the command line: `projects/train_net.py` calls `main`."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm

from d2ctx.config import add_d2ctx_config
from d2ctx.config_file import check_registry_names, merge_config
from d2ctx.datasets import register_coco_format
from d2ctx.errors import UserError
from d2ctx.preflight import check_run
from d2ctx.trainer import Trainer
from d2ctx.weights import SafeCheckpointer

EPILOG = """examples:
  train     projects/train_net.py --config-file configs/d2/a2fpn/mask_rcnn_r50_a2fpn_1x.yaml --num-gpus 4
  continue  the same with --resume
  evaluate  the same with --eval-only MODEL.WEIGHTS output/model_final.pth
  change    end the line with KEY VALUE pairs: SOLVER.BASE_LR 0.005 OUTPUT_DIR output/run2
"""


def load_config(config_file: str | None, opts: Sequence[str] = ()) -> CfgNode:
    """Read a configuration and register the data sets that it defines.

    Args:
        config_file: YAML file, or None for Detectron2's defaults.
        opts: KEY VALUE pairs that override the file.

    Returns:
        The frozen configuration.

    Raises:
        UserError: On unknown keys, wrong types, unreadable files or data-set definitions.
    """
    cfg = get_cfg()
    add_d2ctx_config(cfg)
    merge_config(cfg, config_file=config_file, opts=list(opts))
    check_registry_names(cfg)
    cfg.freeze()
    register_coco_format(cfg)
    return cfg


def run(cfg: CfgNode, args: argparse.Namespace) -> dict[str, Any]:
    """Train or evaluate in this process; every process of a distributed run calls it.

    Args:
        cfg: A configuration that passed `check_run`.
        args: Parsed command line.

    Returns:
        The evaluation results, empty except on the main process.
    """
    register_coco_format(cfg)
    default_setup(cfg, args)
    results = _evaluate(cfg, args.resume) if args.eval_only else _train(cfg, args.resume)
    if comm.is_main_process() and results:
        write_json(Path(cfg.OUTPUT_DIR, "results.json"), results)
    return results


def _evaluate(cfg: CfgNode, resume: bool) -> dict[str, Any]:
    model = Trainer.build_model(cfg)
    loader = SafeCheckpointer(model, cfg.OUTPUT_DIR, min_match=cfg.MODEL.WEIGHTS_MIN_MATCH)
    loader.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    return Trainer.test(cfg, model)


def _train(cfg: CfgNode, resume: bool) -> dict[str, Any]:
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return getattr(trainer, "_last_eval_results", {})


def write_json(path: Path, value: Any) -> None:
    """Write `value` so that an interruption leaves the old file or the new one, never half."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, default=float) + "\n")
    os.replace(partial, path)


def exit_code(program: Callable[[], object]) -> int:
    """Run a command-line program; a user error becomes one line on stderr and exit code 2."""
    try:
        program()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, check everything, then train or evaluate.

    Args:
        argv: Arguments without the program name; None takes them from the process.

    Returns:
        The exit code: 0, or 2 after an error that the user can mend.
    """
    args = default_argument_parser(epilog=EPILOG).parse_args(argv)
    return exit_code(lambda: _checked_launch(args))


def _checked_launch(args: argparse.Namespace) -> None:
    cfg = load_config(args.config_file or None, args.opts)
    for line in check_run(
        cfg, eval_only=args.eval_only, resume=args.resume, num_gpus=args.num_gpus
    ):
        print(line)
    launch(
        run,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(cfg, args),
    )


if __name__ == "__main__":
    sys.exit(main())
