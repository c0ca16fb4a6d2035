"""`python -m d2ctx.analyze`: parameters and MACs of a configuration, part by part."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from d2ctx.complexity import Cost, detector_costs
from d2ctx.config import load_config
from d2ctx.errors import UserError, exit_code

EPILOG = """examples:
  python -m d2ctx.analyze --config-file configs/d2/a2fpn/mask_rcnn_r50_a2fpn_1x.yaml
  python -m d2ctx.analyze --config-file configs/d2/a2fpn/mask_rcnn_r50_fpn_1x.yaml --size 1333x800
"""


def analyze(cfg: CfgNode, *, width: int, height: int) -> dict[str, Cost]:
    """Cost of every part of the model that `cfg` describes.

    Args:
        cfg: A two-stage detector's configuration, see `d2ctx.config.load_config`.
        width: Image width in pixels; padded up to what the backbone divides.
        height: Image height, likewise.

    Returns:
        Part -> cost, in the order of execution, then "total".

    Raises:
        UserError: If the model has no region heads.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    cfg.MODEL.A2FPN.REASSEMBLY = "loop"
    cfg.MODEL.FPT.IMPL = "naive"
    with torch.device("meta"):
        model = build_model(cfg)
    if not hasattr(model, "roi_heads"):
        raise UserError(
            f"analyze counts two-stage detectors, MODEL.META_ARCHITECTURE is "
            f"{cfg.MODEL.META_ARCHITECTURE}; use one with region heads, such as ContextRCNN"
        )
    step = max(model.backbone.size_divisibility, 1)
    costs = detector_costs(model, height=-(-height // step) * step, width=-(-width // step) * step)
    return costs | {"total": sum(costs.values(), Cost())}


def table(costs: dict[str, Cost]) -> str:
    """The costs as text: M parameters and G multiply-accumulates."""
    lines = [
        f"{'':10}{'module-only convention':>28}{'all operations':>28}",
        f"{'part':10}" + f"{'params':>14}{'MACs':>14}" * 2,
    ]
    for name, cost in costs.items():
        values = [cost.module_params / 1e6, cost.module_macs / 1e9]
        values += [cost.all_params / 1e6, cost.all_macs / 1e9]
        units = "MGMG"
        lines.append(
            f"{name:10}" + "".join(f"{v:12.3f} {u}" for v, u in zip(values, units, strict=True))
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command-line entry; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m d2ctx.analyze",
        description="Count parameters and multiply-accumulates (conventions: d2ctx/complexity.py).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--size", default="1280x832", metavar="WxH", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON with exact counts")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs")
    args = parser.parse_args(argv)
    return exit_code(lambda: _print(args))


def _print(args: argparse.Namespace) -> None:
    width, height = _size(args.size)
    cfg = load_config(args.config_file, args.opts)
    costs = analyze(cfg, width=width, height=height)
    if args.json:
        print(json.dumps({name: asdict(cost) for name, cost in costs.items()}, indent=2))
        return
    print(f"{args.config_file}, one image of {width}x{height}\n\n{table(costs)}")


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise UserError(f"--size must be WIDTHxHEIGHT in pixels, such as 1280x832; got {text!r}")
    return int(width), int(height)


if __name__ == "__main__":
    sys.exit(main())
