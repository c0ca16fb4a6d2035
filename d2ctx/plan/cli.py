"""Command line of the rehearsal."""

import argparse
import json
from collections.abc import Sequence

from d2ctx.errors import Interrupted, exit_code
from d2ctx.plan.quiet import quiet
from d2ctx.plan.rehearse import rehearse
from d2ctx.plan.report import Report
from d2ctx.recovery.signals import StopRequest

EPILOG = """examples:
  python -m d2ctx.plan --config-file configs/d2/a2fpn/mask_rcnn_a2fpn_instant.yaml
  python -m d2ctx.plan --config-file my.yaml --num-gpus 8 SOLVER.IMS_PER_BATCH 16
  python -m d2ctx.plan --config-file my.yaml --json

exit codes: 0 GO, 2 NO-GO
"""
STOPPED = "the rehearsal was stopped; nothing of it is left"


def main(argv: Sequence[str] | None = None) -> int:
    """Command-line entry; see `--help`.

    Args:
        argv: Arguments without the program name; None takes them from the process.

    Returns:
        0 GO, 2 NO-GO, 75 after a signal.
    """
    args = _parser().parse_args(argv)
    report = Report(tracebacks=args.traceback)
    if not args.json:
        report.show = lambda step: print(step.text(), flush=True)

    code = exit_code(lambda: _rehearse(args, report))
    if code:
        return code
    if args.json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        print("\n".join(["", *report.verdict()]))
    return 0 if report.go else 2


def _rehearse(args: argparse.Namespace, report: Report) -> None:
    try:
        with quiet(), StopRequest() as stop, stop.at_once(STOPPED):
            rehearse(
                args.config_file,
                args.opts,
                report,
                num_gpus=args.num_gpus,
                num_machines=args.num_machines,
            )
    except Interrupted:  # of the trainer in its own words: there is nothing to go on with
        raise Interrupted(STOPPED) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m d2ctx.plan",
        description=(
            "Rehearse a run in a folder that is removed again: data, weights, two updates, one "
            "image of the evaluation, its result files, a checkpoint saved and restored. Says what "
            "the run needs, and GO or NO-GO with reasons."
        ),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True, metavar="YAML", help="configuration")
    parser.add_argument("--num-gpus", type=int, default=1, help="of the run, for each machine")
    parser.add_argument("--num-machines", type=int, default=1, help="of the run")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--traceback", action="store_true", help="print where a step failed")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs over the file")
    return parser
