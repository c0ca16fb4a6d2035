"""The sub-commands of `segtrain config`."""

import argparse
import json

_EPILOG = """examples:
  segtrain config show configs/seg/mine.yaml optim.lr=1e-3 train.iters=20000
  segtrain config diff configs/seg/mine.yaml output/mine/config.yaml
  segtrain config schema > segtrain.schema.json
"""


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `config` and its sub-commands.

    Args:
        commands: The sub-parsers of the main parser.
    """
    config = commands.add_parser(
        "config",
        help="show, compare and describe configurations",
        description="Show, compare and describe configurations.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).add_subparsers(metavar="COMMAND", required=True)

    show = config.add_parser("show", help="print a configuration with all bases and defaults")
    show.add_argument("file", metavar="FILE", help="YAML file")
    add_overrides(show)
    show.add_argument("--json", action="store_true", help="print JSON instead of YAML")
    show.set_defaults(run=run_show)

    compare = config.add_parser("diff", help="print the keys in which two configurations differ")
    compare.add_argument("first", metavar="A", help="YAML file")
    compare.add_argument("second", metavar="B", help="YAML file")
    compare.add_argument("--json", action="store_true", help="print JSON instead of lines")
    compare.set_defaults(run=run_diff)

    schema = config.add_parser("schema", help="print the JSON schema, for editors and programs")
    schema.set_defaults(run=run_schema)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the arguments `KEY=VALUE ...`.

    Args:
        parser: Gets them as `overrides`.
    """
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="goes over the file, for example optim.lr=1e-3",
    )


def run_show(args: argparse.Namespace) -> int:
    """Run `config show`.

    Args:
        args: Parsed arguments.

    Returns:
        Exit code 0.

    Raises:
        UserError: If the configuration is wrong.
    """
    from segtrain.config.load import dump_yaml, load_config, plain

    config = load_config(args.file, args.overrides)
    if args.json:
        print(json.dumps(plain(config), indent=2))
    else:
        print(dump_yaml(config), end="")
    return 0


def run_diff(args: argparse.Namespace) -> int:
    """Run `config diff`.

    Args:
        args: Parsed arguments.

    Returns:
        Exit code 0, whether they differ or not.

    Raises:
        UserError: If one of the configurations is wrong.
    """
    from segtrain.config.load import diff, load_config

    rows = diff(load_config(args.first), load_config(args.second))
    if args.json:
        print(json.dumps([{"key": k, "first": a, "second": b} for k, a, b in rows], indent=2))
        return 0
    if not rows:
        print("no difference")
    width = max((len(key) for key, _, _ in rows), default=0)
    for key, first, second in rows:
        print(f"{key:<{width}}  {json.dumps(first)} -> {json.dumps(second)}")
    return 0


def run_schema(args: argparse.Namespace) -> int:
    """Run `config schema`.

    Args:
        args: Parsed arguments.

    Returns:
        Exit code 0.
    """
    from segtrain.config.load import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0
