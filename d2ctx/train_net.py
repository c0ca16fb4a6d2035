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
from d2ctx.errors import INTERRUPTED, Interrupted, UserError, exit_code
from d2ctx.files import write_json
from d2ctx.preflight import check_levels, check_run
from d2ctx.recovery.prove import prove
from d2ctx.recovery.signals import passed_on
from d2ctx.registration import register, register_datasets
from d2ctx.runs import start_run
from d2ctx.trainer import Trainer
from d2ctx.weights import SafeCheckpointer

NOT_EXACT = 1
EPILOG = """examples:
  train     projects/train_net.py --config-file configs/d2/a2fpn/mask_rcnn_r50_a2fpn_1x.yaml
  continue  the same with --resume
  prove     the same with --resume --prove 20: repeats 20 updates that the run has done from a
            checkpoint, and compares; exit code 0 means the same to the last bit, 1 not
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
        The exit code: 0, 1 where `--prove` finds a difference, 2 after an error that the user can
        mend, or 75 where a signal stopped a training that can go on.
    """
    parser = default_argument_parser(epilog=EPILOG)
    parser.add_argument(
        "--prove",
        type=int,
        metavar="K",
        help="with --resume: repeat K updates of the run without changing it, and compare",
    )
    args = parser.parse_args(argv)
    return exit_code(lambda: _checked_launch(args))


def _checked_launch(args: argparse.Namespace) -> None:
    _check_prove(args)
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
        _run_or_prove(cfg, args.eval_only, args.resume, args.prove)
        return
    try:
        with passed_on():
            launch(
                _worker,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(cfg, args.eval_only, args.resume, args.prove),
            )
    except ProcessExitedException as error:
        if error.signal_name is None:
            sys.exit(error.exit_code)  # the worker has told why
        raise UserError(
            f"process {error.error_index} was ended by {error.signal_name}, so all are; without "
            "a cause above, most often memory was short: free some, then go on from the last "
            "checkpoint with the same command and --resume"
        ) from error


def _check_prove(args: argparse.Namespace) -> None:
    if args.prove is None:
        return
    if args.eval_only or not args.resume:
        raise UserError("--prove needs --resume, without --eval-only: it repeats a run's training")
    if args.prove < 1:
        raise UserError(f"--prove must be a number of updates from 1 on, got {args.prove}")


def _run_or_prove(cfg: CfgNode, eval_only: bool, resume: bool, updates: int | None) -> None:
    if updates is None:
        run(cfg, eval_only=eval_only, resume=resume)
    elif not prove(cfg, updates):
        sys.exit(NOT_EXACT)


def _worker(cfg: CfgNode, *args: Any) -> None:
    """One of several processes: nothing is registered yet, and no error may be a traceback."""
    register()
    register_datasets(cfg)
    code = exit_code(lambda: _quiet_if_not_main(cfg, *args))
    if code:
        sys.exit(code)


def _quiet_if_not_main(cfg: CfgNode, *args: Any) -> None:
    try:
        _run_or_prove(cfg, *args)
    except Interrupted:
        if comm.is_main_process():
            raise
        sys.exit(INTERRUPTED)  # the main process tells


if __name__ == "__main__":
    sys.exit(main())
