"""Whole detectors against Mask R-CNN with FPN: step time, peak memory, parameters, MACs.

`python -m benchmarks.models [--size 480x320] [--only TEXT] [--repeats N] [--device cuda]`

A step is the forward and the backward pass of one training image with ResNet-50 and all losses. The
proposals are fixed, so that all heads work on the same regions, and their number goes with the area
of the image: 512 at 1344x800, the papers' size. So heads keep their share in a small image.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from benchmarks.common import (
    MIN_ROUNDS,
    limit_memory,
    metadata,
    peak_growth_mib,
    save,
    summary,
    time_phases,
)
from benchmarks.measure import SEED, Setting, in_own_process
from benchmarks.rows import Row, Target, as_json, compare, print_table
from d2ctx.analyze import analyze
from d2ctx.config import load_config

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "d2"
MODULE = "benchmarks.models"
BASELINE = "Mask R-CNN, FPN"
TIME, MEMORY, PARAMETERS = "step time", "peak memory growth", "parameters"
MACS, FEATURE_MACS = "MACs", "MACs, backbone + neck"
UNITS = {TIME: "ms", MEMORY: "MiB", PARAMETERS: "M", MACS: "G", FEATURE_MACS: "G"}
OBJECTS, STUFF = 8, 54  # boxes of the image, labels of its semantic map
REGIONS, FULL_SIZE = 512, 1344 * 800
JITTER = 0.1  # largest shift of a proposal's corners, in sides of its object
WARMUP = 1


@dataclass(frozen=True, kw_only=True)
class Form:
    """One system.

    Attributes:
        config: Its file below configs/d2.
        opts: KEY VALUE pairs over it.
        limit: What its step time must not exceed, relative to the baseline; None: no target.
    """

    config: str
    opts: Sequence[Any] = field(default=())
    limit: float | None = None

    def load(self, device: str, *, regions: int = REGIONS) -> CfgNode:
        """The configuration, with random weights, and as many regions per image."""
        opts = ["MODEL.WEIGHTS", "", "MODEL.DEVICE", device, *self.opts]
        opts += ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", regions]
        return load_config(str(CONFIGS / self.config), opts)


POOLED = ["MODEL.FPT.KV_POOL", [2, 2, 1, 1]]
FORMS = {
    BASELINE: Form(config="a2fpn/mask_rcnn_r50_fpn_1x.yaml"),
    "Mask R-CNN, PAFPN": Form(config="a2fpn/mask_rcnn_r50_pafpn_1x.yaml"),
    "Mask R-CNN, A²-FPN Lite": Form(config="a2fpn/mask_rcnn_r50_a2fpn_lite_1x.yaml"),
    "Mask R-CNN, A²-FPN": Form(config="a2fpn/mask_rcnn_r50_a2fpn_1x.yaml", limit=1.5),
    "Mask R-CNN, FPN, SR-ResNet": Form(config="sr/mask_rcnn_r50_fpn_sr_1x.yaml", limit=1.03),
    "Mask R-CNN, FPN, non-local ResNet": Form(config="sr/mask_rcnn_r50_fpn_nl_1x.yaml"),
    "Mask R-CNN, FPT": Form(config="fpt/mask_rcnn_r50_fpt_1x.yaml"),
    "Mask R-CNN, FPT, keys of p2, p3 pooled": Form(
        config="fpt/mask_rcnn_r50_fpt_1x.yaml", opts=POOLED
    ),
    "Mask R-CNN, FPT, adjacent pairs, pooled": Form(config="fpt/mask_rcnn_r50_fpt_small_1x.yaml"),
    "Cascade Mask R-CNN, FPN": Form(config="a2fpn/cascade_mask_rcnn_r50_fpn_1x.yaml"),
    "Hybrid Task Cascade, FPN": Form(config="a2fpn/htc_r50_fpn_20e.yaml"),
    "Panoptic FPN": Form(config="panoptic/panoptic_fpn_r50_fpn_1x.yaml"),
}


def training_image(height: int, width: int, *, device: str) -> dict[str, Any]:
    """One image of noise with random boxes of all sizes, their masks, and a semantic map."""
    generator = torch.Generator().manual_seed(SEED)
    corners = torch.rand(OBJECTS, 2, generator=generator) * torch.tensor([width, height]) * 0.7
    sides = torch.linspace(0.08, 0.6, OBJECTS)[:, None] * torch.tensor([width, height])
    ends = torch.minimum(corners + sides, torch.tensor([width, height]) - 1.0)
    boxes = torch.cat([corners, ends], dim=1)
    masks = torch.zeros(OBJECTS, height, width, dtype=torch.bool)
    for mask, (x, y, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y:bottom, x:right] = True
    truth = Instances((height, width), gt_boxes=Boxes(boxes), gt_masks=BitMasks(masks))
    truth.gt_classes = torch.zeros(OBJECTS, dtype=torch.int64)
    pixels = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, STUFF, (height, width), generator=generator)
    return {
        "image": pixels.to(device),
        "instances": truth.to(device),
        "sem_seg": labels.to(device),
    }


def proposals_of(image: dict[str, Any], *, count: int) -> Instances:
    """Boxes near the objects and boxes anywhere, `count` of each."""
    generator = torch.Generator().manual_seed(SEED)
    truth = image["instances"]
    objects = truth.gt_boxes.tensor.cpu().repeat(-(-count // OBJECTS), 1)[:count]
    sides = (objects[:, 2:] - objects[:, :2]).repeat(1, 2)
    near = objects + JITTER * sides * (2 * torch.rand(count, 4, generator=generator) - 1)
    height, width = truth.image_size
    corners = torch.rand(count, 2, 2, generator=generator) * torch.tensor([width, height])
    anywhere = torch.cat([corners.amin(1), corners.amax(1) + 8], dim=1)
    boxes = Boxes(torch.cat([near, anywhere]).to(truth.gt_classes.device))
    boxes.clip((height, width))
    logits = torch.zeros(len(boxes), device=truth.gt_classes.device)
    return Instances((height, width), proposal_boxes=boxes, objectness_logits=logits)


def step_of(model: nn.Module, image: dict[str, Any]) -> list[Callable[[], None]]:
    """Forward and backward pass of a training step; every one draws the same regions."""
    losses: dict[str, torch.Tensor] = {}

    def forward() -> None:
        torch.manual_seed(SEED)
        losses.update(model([image]))

    def backward() -> None:
        sum(losses.values()).backward()
        losses.clear()
        model.zero_grad(set_to_none=True)

    return [forward, backward]


def measure(form: Form, height: int, width: int, setting: Setting) -> dict[str, Any]:
    """Times and memory of one system; called in its own process."""
    regions = max(4 * OBJECTS, round(REGIONS * height * width / FULL_SIZE))
    torch.manual_seed(SEED)
    model = build_model(form.load(setting.device, regions=regions)).train()
    image = training_image(height, width, device=setting.device)
    proposals = proposals_of(image, count=regions)
    # The region proposal network learns, but what it finds with random weights is left out.
    model.proposal_generator.predict_proposals = lambda *_: [proposals]
    phases = step_of(model, image)

    def both() -> None:
        for phase in phases:
            phase()

    with EventStorage() as storage:
        times = time_phases(
            phases,
            device=setting.device,
            warmup=WARMUP,
            seconds=setting.seconds,
            min_rounds=MIN_ROUNDS,
        )
        memory = peak_growth_mib(both, device=setting.device)
        logged = {k: v for k, (v, _) in storage.latest().items() if "num_" in k}
    return {
        "seconds": [sum(parts) for parts in zip(*times, strict=True)],
        "memory": memory,
        "regions": logged,
    }


def pooled(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Results of several processes as one; {"failed": ...} where one of them failed."""
    for result in results:
        if "failed" in result:
            return result
    return {
        "time": summary([s for result in results for s in result["seconds"]]),
        "memory": max(result["memory"] for result in results),
        "regions": results[0]["regions"],
    }


def size_of(form: Form, height: int, width: int) -> dict[str, float]:
    """Millions of parameters, and thousand millions of MACs of one image at test."""
    costs = analyze(form.load("cpu"), width=width, height=height)
    total, features = costs["total"], costs["backbone"] + costs["neck"]
    return {
        PARAMETERS: total.all_params / 1e6,
        MACS: total.all_macs / 1e9,
        FEATURE_MACS: features.all_macs / 1e9,
    }


def values(result: dict[str, Any]) -> dict[str, float | None]:
    """The number of each metric; None where it could not be measured."""
    failed = "failed" in result
    return {
        TIME: None if failed else result["time"]["median_ms"],
        MEMORY: None if failed else result["memory"],
        **{metric: result[metric] for metric in (PARAMETERS, MACS, FEATURE_MACS)},
    }


def rows_of(name: str, results: dict[str, dict[str, Any]]) -> list[Row]:
    """One row per metric, beside the baseline's of the same run."""
    own, base = values(results[name]), values(results[BASELINE])
    limit = FORMS[name].limit
    return [
        compare(
            name,
            metric,
            UNITS[metric],
            own[metric],
            baseline="" if name == BASELINE else BASELINE,
            baseline_value=None if name == BASELINE else base[metric],
            target=Target(of="ratio", limit=limit) if limit and metric == TIME else None,
            note=results[name].get("failed", ""),
        )
        for metric in UNITS
    ]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="480x320", metavar="WxH", help="default: %(default)s")
    parser.add_argument("--only", default="", help="systems whose name contains this; and FPN")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's choice")
    parser.add_argument("--seconds", type=float, default=4.0, help="measured time per process")
    parser.add_argument(
        "--repeats", type=int, default=2, help="processes per system, taking turns (default: 2)"
    )
    parser.add_argument("--measure", nargs=2, metavar=("SIZE", "FORM"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def measured(chosen: Sequence[str], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure systems in turns, each time in a process of its own."""
    setting = Setting(device=options.device, seconds=options.seconds, threads=options.threads)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    for _ in range(options.repeats):
        for name in chosen:
            found[name].append(in_own_process(MODULE, options.size, name, setting))
    width, height = map(int, options.size.split("x"))
    return {n: pooled(results) | size_of(FORMS[n], height, width) for n, results in found.items()}


def main() -> None:
    """Measure every system, print the table, write the results."""
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.measure:
        size, name = options.measure
        if options.device == "cpu":
            limit_memory()
        width, height = map(int, size.split("x"))
        setting = Setting(device=options.device, seconds=options.seconds, threads=options.threads)
        print(json.dumps(measure(FORMS[name], height, width, setting)))
        return
    chosen = [name for name in FORMS if name == BASELINE or options.only in name]
    results = measured(chosen, options)
    rows = [row for name in chosen for row in rows_of(name, results)]
    print_table(rows)
    where = options.device if options.device == "cuda" else f"cpu{torch.get_num_threads()}"
    content = as_json(rows, metadata(device=options.device, seed=SEED), details=results)
    print("written:", save(f"models-{options.size}-{where}", content))


if __name__ == "__main__":
    main()
