"""The sub-command `segtrain plan`; torch is loaded only when it runs."""

import argparse
import json

from segtrain.config.commands import add_overrides

_EPILOG = """examples:
  segtrain plan --config configs/seg/segmenter/seg_tiny_instant.yaml
  segtrain plan --config my.yaml train.micro_batch=4 output=output/short
  segtrain plan --config my.yaml --json

exit codes: 0 GO, 2 NO-GO
"""


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `plan`.

    Args:
        commands: The sub-parsers of the main parser.
    """
    parser = commands.add_parser(
        "plan",
        help="rehearse a run: what it needs, and what would stop it",
        description=(
            "Rehearse a run in a folder that is removed again: labels, weights, two updates, one "
            "image of the evaluation, a checkpoint saved and restored, results for a server. Says "
            "what the run needs, and GO or NO-GO with reasons."
        ),
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="YAML", help="configuration file")
    add_overrides(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run_plan)


def run_plan(args: argparse.Namespace) -> int:
    """Run `plan`.

    Args:
        args: Parsed arguments.

    Returns:
        Exit code: 0 GO, 2 NO-GO.

    Raises:
        UserError: If this is one of several processes.
        Interrupted: After a signal.
    """
    from segtrain.errors import Interrupted
    from segtrain.files import plain
    from segtrain.plan.rehearse import rehearse
    from segtrain.plan.report import Report
    from segtrain.train.signals import StopRequest

    report = Report(tracebacks=args.traceback)
    if not args.json:
        report.show = lambda step: print(step.text(), flush=True)
    try:
        with StopRequest() as stop, stop.at_once(""):
            rehearse(args.config, args.overrides, report)
    except Interrupted:  # of the loop in its own words: there is nothing to resume
        raise Interrupted("the rehearsal was stopped; nothing of it is left") from None
    if args.json:
        print(json.dumps(plain(report.as_dict()), indent=2))
    else:
        print("\n".join(["", *report.verdict()]))
    return 0 if report.go else 2
