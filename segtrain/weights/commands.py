"""The sub-commands `weights`, `analyze`, `bench`; each imports what it runs when it runs."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from segtrain.config.commands import add_overrides

if TYPE_CHECKING:
    from segtrain.weights.read import WeightFile

_WEIGHTS_EPILOG = """layouts:
  segmenter       ours and the authors': their checkpoint.pth, with variant.yml beside it
  mmsegmentation  Segmenter of MMSegmentation, linear or mask
  timm            a vision transformer: an encoder for model.pretrained
  network         any network of ours (model.name: network)
  unept           UN-EPT's released code; becomes a network

examples:
  segtrain weights inspect checkpoint.pth
  segtrain weights inspect checkpoint.pth --config configs/seg/segmenter/ade20k_b16_mask.yaml
  segtrain weights convert checkpoint.pth weights/seg_b_mask.safetensors
  segtrain weights convert mine.safetensors theirs.safetensors --to mmsegmentation
"""
_ANALYZE_EPILOG = """examples:
  segtrain analyze --config configs/seg/segmenter/ade20k_s16_mask.yaml
  segtrain analyze --config my.yaml --size 768x768 --batch 8 --classes 19 train.precision=bf16
"""
_BENCH_EPILOG = """examples:
  segtrain bench --config configs/seg/segmenter/ade20k_s16_mask.yaml --seconds 10
  segtrain bench --config my.yaml --device cuda --batch 8 train.precision=bf16 train.compile=true
"""
_Commands = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_commands(commands: _Commands) -> None:
    """Add `weights`, `analyze` and `bench`.

    Args:
        commands: The sub-parsers of the main parser.
    """
    weights = commands.add_parser(
        "weights",
        help="look into weight files and convert them",
        description="Look into weight files and convert them; no code in them is run.",
        epilog=_WEIGHTS_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).add_subparsers(metavar="COMMAND", required=True)
    _add_inspect(weights)
    _add_convert(weights)
    analyze = _add_model_command(
        commands, "analyze", "count parameters, multiply-accumulates and memory", _ANALYZE_EPILOG
    )
    analyze.set_defaults(run=run_analyze)
    bench = _add_model_command(
        commands, "bench", "measure images per second on random images", _BENCH_EPILOG
    )
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    bench.add_argument(
        "--seconds", type=float, default=5.0, metavar="S", help="measured time (default: 5)"
    )
    bench.add_argument(
        "--inference", action="store_true", help="leave out the training step, and its memory"
    )
    bench.set_defaults(run=run_bench)


def _add_inspect(commands: _Commands) -> None:
    parser = commands.add_parser("inspect", help="what a file holds, and how it fits a model")
    parser.add_argument("file", type=Path, metavar="FILE", help="weights")
    parser.add_argument("--config", metavar="YAML", help="compare with the model of a run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_inspect)


def _add_convert(commands: _Commands) -> None:
    parser = commands.add_parser("convert", help="write a file in another layout")
    parser.add_argument("source", type=Path, metavar="IN", help="weights")
    parser.add_argument("target", type=Path, metavar="OUT", help="file to write, *.safetensors")
    parser.add_argument(
        "--to",
        choices=("segmenter", "mmsegmentation", "timm"),
        help="layout to write, of a Segmenter (default: ours)",
    )
    parser.add_argument(
        "--variant", type=Path, metavar="YML", help="variant.yml, where it is not beside IN"
    )
    parser.set_defaults(run=run_convert)


def _add_model_command(
    commands: _Commands, name: str, text: str, epilog: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="YAML", help="configuration file")
    parser.add_argument(
        "--size", type=_size, metavar="SIDE|HxW", help="pixels (default: data.crop)"
    )
    parser.add_argument("--batch", type=_count, default=1, metavar="B", help="images (default: 1)")
    parser.add_argument("--classes", type=int, metavar="K", help="default: those of the data set")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_overrides(parser)
    return parser


def run_inspect(args: argparse.Namespace) -> int:
    """Run `weights inspect`.

    Args:
        args: Parsed arguments.

    Returns:
        Exit code 0.

    Raises:
        UserError: If the file cannot be read, or is of no known layout.
    """
    from segtrain.weights.inspect import against, summary

    facts = summary(args.file)
    if args.config is not None:
        facts["fit"] = against(args.file, args.config)
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    print("\n".join(f"{key}: {value}" for key, value in facts.items() if key not in _BLOCKS))
    for key in _BLOCKS:
        if key in facts:
            print(f"\n{facts[key]}")
    return 0


_BLOCKS = ("parts", "config", "fit")


def run_convert(args: argparse.Namespace) -> int:
    """Run `weights convert`.

    Args:
        args: Parsed arguments.

    Returns:
        Exit code 0.

    Raises:
        UserError: If the file cannot be read or translated.
    """
    from segtrain.weights.convert import convert
    from segtrain.weights.network import is_network
    from segtrain.weights.own import check_target
    from segtrain.weights.read import read_weights
    from segtrain.wording import first_of, plural

    check_target(args.target)
    file = read_weights(args.source)
    if is_network(file.tensors):
        return _convert_network(file, args)
    layout = args.to or "segmenter"
    found = convert(file, args.target, layout=layout, variant=args.variant)
    print(f"{found.layout}: {found.architecture}")
    if found.left_out:
        print(f"left out: {first_of(found.left_out)}")
    print(f"wrote {args.target}: {plural(len(found.tensors), 'tensor')}")
    if layout == "segmenter":
        key = "init" if found.architecture.decoder else "model.pretrained"
        print(f"\nto use it, {key}: {args.target} and\n{found.yaml()}")
    return 0


def _convert_network(file: "WeightFile", args: argparse.Namespace) -> int:
    from segtrain.errors import UserError
    from segtrain.weights.network import convert_network
    from segtrain.weights.own import as_yaml
    from segtrain.wording import plural

    if args.to or args.variant:
        raise UserError(f"{file.path} holds a network; --to and --variant are for a Segmenter")
    found = convert_network(file, args.target)
    print(f"{found.layout}: backbone and head, {plural(found.num_classes, 'class')}")
    print(f"wrote {args.target}: {plural(len(found.tensors), 'tensor')}")
    if found.config:
        print(f"\nto use it, init: {args.target} and\n{as_yaml(found.config)}")
    return 0


def run_analyze(args: argparse.Namespace) -> int:
    """Run `analyze`.

    Args:
        args: Parsed arguments.

    Returns:
        Exit code 0.

    Raises:
        UserError: If the configuration is wrong.
    """
    from dataclasses import asdict

    from segtrain.analyze import analyze, num_classes_of, table
    from segtrain.config.load import load_config

    config = load_config(args.config, args.overrides)
    size = args.size or config.data.crop
    classes = num_classes_of(config, args.classes)
    costs = analyze(config, num_classes=classes, size=size, batch=args.batch)
    if args.json:
        print(json.dumps({part: asdict(cost) for part, cost in costs.items()}, indent=2))
        return 0
    print(f"{args.config}: {args.batch} x {size[0]}x{size[1]}, {classes} classes\n")
    print(table(costs, config))
    return 0


def run_bench(args: argparse.Namespace) -> int:
    """Run `bench`.

    Args:
        args: Parsed arguments.

    Returns:
        Exit code 0.

    Raises:
        UserError: If the configuration is wrong, or the device cannot do it.
    """
    from segtrain.analyze import num_classes_of
    from segtrain.bench import as_dict, bench
    from segtrain.config.load import load_config

    config = load_config(args.config, args.overrides)
    speeds = bench(
        config,
        num_classes=num_classes_of(config, args.classes),
        size=args.size or config.data.crop,
        batch=args.batch,
        device=args.device,
        seconds=args.seconds,
        training=not args.inference,
    )
    if args.json:
        print(json.dumps(as_dict(speeds), indent=2))
    else:
        print("\n".join(map(str, speeds)))
    return 0


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a number from 1, got {text!r}")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    """Parse "512" or "768x1024" into height and width."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(p.isdecimal() and int(p) for p in parts):
        raise argparse.ArgumentTypeError(f"expected SIDE or HxW like 512 or 768x1024, got {text!r}")
    return int(parts[0]), int(parts[-1])
