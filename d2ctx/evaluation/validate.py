"""`python -m d2ctx.evaluation.validate`: check a submission before it is sent."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from d2ctx.errors import UserError, exit_code
from d2ctx.evaluation.panoptic_files import read_json
from d2ctx.evaluation.violations import (
    cityscapes_violations,
    coco_violations,
    panoptic_violations,
)
from d2ctx.files import write_text
from d2ctx.wording import plural

EPILOG = """examples, after a run in output/run:
  coco        coco_instances_results.json --truth image_info_test-dev2017.json --task segm
              --out detections_test-dev2017_mine_results.json
  panoptic    panoptic_predictions.json --truth panoptic_val2017.json
  cityscapes  cityscapes_instances --root cityscapes --split test
exit code: 0 nothing wrong, 1 violations, 2 wrong use
"""
IMAGE = "_leftImg8bit.png"


def main(argv: Sequence[str] | None = None) -> int:
    """Command-line entry; see `--help`.

    Args:
        argv: Arguments without the program name; None takes them from the process.

    Returns:
        0, 1 where there are violations, or 2 after an error of use.
    """
    args = _parser().parse_args(argv)
    found: list[str] = []
    code = exit_code(lambda: found.extend(args.check(args)))
    if code:
        return code
    print("\n".join([*found, f"{plural(len(found), 'violation')} in {args.results}"]))
    return 1 if found else exit_code(lambda: _write(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m d2ctx.evaluation.validate",
        description="List everything that a server would refuse in a submission.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(required=True, metavar="KIND")
    coco = kinds.add_parser("coco", help="a json of detections")
    coco.add_argument("--task", choices=("bbox", "segm", "both"), default="both")
    coco.add_argument("--out", type=Path, help="write what the server of --task takes, if sound")
    coco.set_defaults(check=_coco)
    panoptic = kinds.add_parser("panoptic", help="a json beside a folder of PNGs of its name")
    panoptic.set_defaults(check=_panoptic)
    for kind in (coco, panoptic):
        kind.add_argument("--truth", type=Path, required=True, help="json of the set")
    cityscapes = kinds.add_parser("cityscapes", help="a folder of instances")
    cityscapes.add_argument("--root", type=Path, required=True, help="folder of leftImg8bit")
    cityscapes.add_argument("--split", default="test", choices=("train", "val", "test"))
    cityscapes.set_defaults(check=_cityscapes)
    for kind in (coco, panoptic, cityscapes):
        kind.add_argument("results", type=Path)
    return parser


def _coco(args: argparse.Namespace) -> Iterable[str]:
    if args.out and args.task == "both":
        raise UserError("--out needs --task bbox or --task segm: a server takes one of them")
    return coco_violations(read_json(args.results), _truth(args.truth), task=args.task)


def _panoptic(args: argparse.Namespace) -> Iterable[str]:
    folder = args.results.with_suffix("")
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; put the PNGs into a folder of the json's name")
    return panoptic_violations(read_json(args.results), folder, _truth(args.truth))


def _cityscapes(args: argparse.Namespace) -> Iterable[str]:
    root = args.root / "leftImg8bit" / args.split
    images = {p.name.removesuffix(IMAGE): p for p in sorted(root.glob(f"*/*{IMAGE}"))}
    if not images:
        raise UserError(f"{root} holds no <city>/*{IMAGE}; mend --root or --split")
    if not args.results.is_dir():
        raise UserError(f"{args.results} is no folder; give the folder of the text files")
    return cityscapes_violations(args.results, images)


def _truth(path: Path) -> dict[str, Any]:
    truth = read_json(path)
    lists = [truth.get(key) for key in ("images", "categories")] if isinstance(truth, dict) else []
    if not (lists and all(isinstance(listed, list) for listed in lists)):
        raise UserError(f'{path} has no "images" and "categories"; give the json of the set')
    fields = {"images": ("id", "width", "height"), "categories": ("id",)}
    for key, names in fields.items():
        if not all(_has_ids(entry, names) for entry in truth[key]):
            raise UserError(f"{path}: {key} lack {', '.join(names)}; give the json of the set")
    return truth


def _has_ids(entry: Any, names: Iterable[str]) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(n), int | str) for n in names)


def _write(args: argparse.Namespace) -> None:
    """Write the results with the fields of one task, where that was asked for.

    A server that finds boxes beside masks would take the objects' sizes from the boxes.
    """
    if not getattr(args, "out", None):
        return
    field = {"bbox": "bbox", "segm": "segmentation"}[args.task]
    keys = ("image_id", "category_id", field, "score")
    results = [{key: result[key] for key in keys} for result in read_json(args.results)]
    write_text(args.out, json.dumps(results))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    sys.exit(main())
