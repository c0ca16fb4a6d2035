"""Training and evaluation from the command line: `projects/train_net.py` calls `main`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from d2ctx.config import load_config
from d2ctx.errors import exit_code
from d2ctx.files import write_json
from d2ctx.preflight import check_levels, check_run
from d2ctx.recovery.signals import passed_on
from d2ctx.registration import register, register_datasets
from d2ctx.runs import start_run
from d2ctx.trainer import Trainer
from d2ctx.weights import SafeCheckpointer

EPILOG = """examples:
  train     projects/train_net.py --config-file configs/d2/a2fpn/mask_rcnn_r50_a2fpn_1x.yaml
  continue  the same with --resume
  evaluate  the same with --eval-only MODEL.WEIGHTS output/model_final.pth
  change    end the line with KEY VALUE pairs: SOLVER.BASE_LR 0.005 OUTPUT_DIR output/run2
"""


def run(cfg: CfgNode, *, eval_only: bool = False, resume: bool = False) -> dict[str, Any]:
    """Train or evaluate in this process; every process of a distributed run calls it.

    Args:
        cfg: A configuration of `load_config` that passed `check_run`.
        eval_only: Whether to evaluate instead of training.
        resume: Whether to continue from the last checkpoint in `OUTPUT_DIR`.

    Returns:
        The evaluation results, empty except on the main process.

    Raises:
        UserError: If the weights cannot be used.
    """
    start_run(cfg)
    results = _evaluate(cfg, resume) if eval_only else _train(cfg, resume)
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
    return trainer.last_results


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, check everything, then train or evaluate.

    Args:
        argv: Arguments without the program name; None takes them from the process.

    Returns:
        The exit code: 0, 2 after an error that the user can mend, or 75 where a signal stopped
        a training that can go on.
    """
    args = default_argument_parser(epilog=EPILOG).parse_args(argv)
    return exit_code(lambda: _checked_launch(args))


def _checked_launch(args: argparse.Namespace) -> None:
    cfg = load_config(args.config_file or None, args.opts)
    lines = check_run(
        cfg,
        eval_only=args.eval_only,
        resume=args.resume,
        num_gpus=args.num_gpus,
        num_machines=args.num_machines,
    )
    check_levels(cfg)
    print("\n".join(lines))
    if args.num_gpus * args.num_machines <= 1:
        run(cfg, eval_only=args.eval_only, resume=args.resume)
        return
    try:
        with passed_on():
            launch(
                _worker,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(cfg, args.eval_only, args.resume),
            )
    except ProcessExitedException as error:
        sys.exit(error.exit_code)  # the worker has told why


def _worker(cfg: CfgNode, eval_only: bool, resume: bool) -> None:
    """`run` in a spawned process: nothing is registered yet, and no error may be a traceback."""
    register()
    register_datasets(cfg)
    code = exit_code(lambda: run(cfg, eval_only=eval_only, resume=resume))
    if code:
        sys.exit(code)


if __name__ == "__main__":
    sys.exit(main())
