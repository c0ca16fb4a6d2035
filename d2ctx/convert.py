"""`python -m d2ctx.weights convert` and `inspect`: other packages' ResNets for MODEL.WEIGHTS."""

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
from torch import Tensor

from d2ctx.convert_names import CAFFE2, TORCHVISION
from d2ctx.convert_resnet import ResNetWeights, translate
from d2ctx.errors import UserError, exit_code
from d2ctx.files import write_bytes
from d2ctx.weight_files import load_weights_file
from d2ctx.weight_report import part_of
from d2ctx.wording import first_of, plural

SUFFIX = ".safetensors"
AUTO = "auto"
_PATH_FIX = "mend the path, or download the file first"
EPILOG = """examples:
  python -m d2ctx.weights inspect resnext101_64x4d-173b62eb.pth
  python -m d2ctx.weights convert resnext101_64x4d-173b62eb.pth weights/resnext101_64x4d.safetensors
  python -m d2ctx.weights convert --arch resnet50 R-50.pkl weights/r50.safetensors
"""
# What the networks were trained with is not in the files.
_RGB = [
    "MODEL.RESNETS.STRIDE_IN_1X1 False, INPUT.FORMAT RGB,",
    "MODEL.PIXEL_MEAN [123.675, 116.28, 103.53], MODEL.PIXEL_STD [58.395, 57.12, 57.375]",
    "(torchvision's; timm's are the same but where its model card says otherwise)",
]
_BGR = [
    "INPUT.FORMAT BGR, MODEL.PIXEL_MEAN [103.53, 116.28, 123.675], and for MSRA's ResNets",
    "MODEL.RESNETS.STRIDE_IN_1X1 True, MODEL.PIXEL_STD [1.0, 1.0, 1.0]; for X-101-32x8d",
    "MODEL.RESNETS.STRIDE_IN_1X1 False, MODEL.PIXEL_STD [57.375, 57.12, 58.395]",
]
_UNKNOWN = [
    "what the source says about MODEL.RESNETS.STRIDE_IN_1X1, INPUT.FORMAT and MODEL.PIXEL_*"
]


def convert(source: str, target: Path, *, arch: str = AUTO) -> ResNetWeights:
    """Write a ResNet's weights under Detectron2's names, for MODEL.WEIGHTS.

    Args:
        source: Weights of torchvision, timm or Detectron2's zoo; a path, or an address that
            Detectron2 knows.
        target: The .safetensors file; its folder is made, an existing file is replaced.
        arch: The architecture that is expected, as `resnext101_64x4d`; "auto": any.

    Returns:
        What was found and written.

    Raises:
        UserError: If the file is unreadable, unsafe, or no complete ResNet of Detectron2.
    """
    if target.suffix != SUFFIX:
        raise UserError(f"OUT must end in {SUFFIX}, got {target}; name it {target.stem}{SUFFIX}")
    weights = load_weights_file(source, fix=_PATH_FIX)
    try:
        found = translate(weights)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    name = found.architecture.name
    if arch not in (AUTO, name):
        raise UserError(
            f"{source} holds a {name}, expected {arch}; take another file, or --arch {name}"
        )
    if problem := found.problem():
        raise UserError(f"{source} cannot be converted: {problem}\n{name}:\n{found.report.table()}")
    tensors = found.usable()
    metadata = {"format": "pt", "architecture": name, "names": "Detectron2"}
    target.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(target, safetensors.torch.save(tensors, metadata=metadata))
    return found


def describe(weights: Mapping[str, Tensor | np.ndarray]) -> str:
    """What a weight file holds: counts, dtypes, and how it fits Detectron2's ResNet.

    Args:
        weights: Tensor name -> values.

    Returns:
        Lines of text.
    """
    dtypes = Counter(str(value.dtype).removeprefix("torch.") for value in weights.values())
    elements = sum(int(np.prod(value.shape)) for value in weights.values())
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
    lines = [f"{plural(len(weights), 'tensor')} ({kinds}), {elements:,} numbers"]
    try:
        found = translate(weights)
    except UserError as error:
        return "\n".join([*lines, *_parts(weights), f"not convertible: {error}"])
    problem = found.problem()
    verdict = f"not convertible: {problem}" if problem else "convertible"
    return "\n".join([*lines, _summary(found), found.report.table(), verdict])


def _parts(weights: Mapping[str, Tensor | np.ndarray]) -> list[str]:
    counts = Counter(part_of(name) for name in weights)
    return [f"  {part}: {plural(count, 'tensor')}" for part, count in counts.items()]


def _summary(found: ResNetWeights) -> str:
    arch, below = found.architecture, found.naming.prefix
    place = f", below {below!r}" if below else ""
    return (
        f"{found.naming.kind} names{place}: {arch.name} (MODEL.RESNETS.DEPTH {arch.depth}, "
        f"NUM_GROUPS {arch.num_groups}, WIDTH_PER_GROUP {arch.width_per_group}, NORM {arch.norm})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command-line entry; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m d2ctx.weights",
        description="Convert ResNet and ResNeXt weights for MODEL.WEIGHTS, or look into a file. "
        "Files are read without running code that they may contain.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    converter = commands.add_parser("convert", help="write Detectron2's names to a .safetensors")
    converter.add_argument("source", metavar="IN", help="file of torchvision, timm or Detectron2")
    converter.add_argument("target", metavar="OUT", type=Path, help=f"file to write, *{SUFFIX}")
    converter.add_argument(
        "--arch", default=AUTO, help="refuse any other, as resnet50 (default: %(default)s)"
    )
    inspector = commands.add_parser("inspect", help="print what a weight file holds")
    inspector.add_argument("source", metavar="FILE")
    args = parser.parse_args(argv)
    if args.command == "inspect":
        return exit_code(lambda: print(describe(load_weights_file(args.source, fix=_PATH_FIX))))
    return exit_code(lambda: _convert(args))


def _convert(args: argparse.Namespace) -> None:
    found = convert(args.source, args.target, arch=args.arch)
    report = found.report
    print(f"{_summary(found)}\n{report.table()}")
    if found.left_out:
        print(f"left out: {first_of(found.left_out)}")
    if found.folded:
        print(f"folded into the norm behind: {first_of(found.folded)}")
    numbers = sum(found.tensors[name].numel() for name in report.matched)
    print(f"wrote {args.target}: {plural(len(report.matched), 'tensor')}, {numbers:,} numbers")
    hint = {TORCHVISION: _RGB, CAFFE2: _BGR}.get(found.naming.kind, _UNKNOWN)
    print("\n  ".join([f"set MODEL.WEIGHTS {args.target} and", *hint]))
