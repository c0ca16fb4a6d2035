"""Memory of a training step of FPT on UFP over the side of the crop, and what 969 will take.

`python -m benchmarks.fpt_seg [--crops 129 257 ...] [--only TEXT] [--limit GIB] [--device cuda]`

One image, ResNet-101, random weights, forward and backward pass of the loss; the growth of the peak
holds activations and gradients. What does not fit into the limit fails, and does not count. Memory
is linear in the number of pixels, because no attention weight is kept: a line through the measured
crops gives the forecast for the paper's crop, weights and momentum added.
"""

import argparse
import json
import resource
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import limit_memory, metadata, peak_growth_mib, save, synchronize
from benchmarks.measure import SEED, Setting, in_own_process
from benchmarks.rows import Row, Target, as_json, compare, print_table
from ctxops.losses import cross_entropy
from segtrain.config.load import load_config
from segtrain.models import build_model

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "seg" / "fpt"
MODULE = "benchmarks.fpt_seg"
CLASSES, PAPER_CROP, BUDGET_GIB = 19, 969, 24.0
CROPS = (129, 257, 385, 513, 641)
COPIES = 2  # weights and momentum; gradients are part of the growth


@dataclass(frozen=True, kw_only=True)
class Form:
    """One system.

    Attributes:
        config: Its file below configs/seg/fpt.
        half: Whether activations are bfloat16.
        budget: Whether it should train in the budget.
    """

    config: str
    half: bool = False
    budget: bool = False


FORMS = {
    "UFP, fp32": Form(config="table4/cityscapes_ufp.yaml"),
    "UFP, bf16": Form(config="table4/cityscapes_ufp.yaml", half=True),
    "UFP + FPT, fp32": Form(config="cityscapes_ufp_fpt.yaml", budget=True),
    "UFP + FPT, bf16": Form(config="cityscapes_ufp_fpt.yaml", half=True, budget=True),
}


def measure(form: Form, crop: int, device: str) -> dict[str, float]:
    """Memory and time of one step; called in its own process."""
    torch.manual_seed(SEED)
    config = load_config(CONFIGS / form.config)
    model = build_model(config.model, CLASSES, image_size=(crop, crop)).to(device).train()
    image = torch.randn(1, 3, crop, crop, device=device)
    labels = torch.randint(CLASSES, (1, crop, crop), device=device)
    seconds = []

    def step() -> None:
        begin = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16) if form.half else nullcontext():
            logits = model(image)["logits"]
        cross_entropy(logits, labels).backward()
        model.zero_grad(set_to_none=True)
        synchronize(device)
        seconds.append(time.perf_counter() - begin)

    step()  # what libraries allocate once
    memory = peak_growth_mib(step, device=device)
    parameters = sum(p.numel() for p in model.parameters())
    return {"memory": memory, "seconds": seconds[-1], "fixed": COPIES * 4 * parameters / 2**20}


def forecast(memory: Mapping[int, float], crop: int) -> tuple[float, float] | None:
    """Memory at a crop by a straight line over pixels.

    Args:
        memory: Side of the crop -> MiB.
        crop: The side asked for.

    Returns:
        MiB, and the largest relative distance of a measured point from the line; None from fewer
        than three points, through which any line may go.
    """
    if len(memory) < 3:
        return None
    pixels = np.array([float(side) ** 2 for side in memory])
    measured = np.array(list(memory.values()))
    line = np.polynomial.Polynomial.fit(pixels, measured, 1)
    return float(line(float(crop) ** 2)), float(np.max(np.abs(line(pixels) / measured - 1)))


def rows_of(name: str, results: Mapping[int, dict[str, Any]]) -> list[Row]:
    """Rows of every crop, and of the forecast."""
    rows = []
    for crop, result in results.items():
        note = result.get("failed", "")
        label = f"{name}, {crop}x{crop}"
        rows.append(compare(label, "peak memory growth", "MiB", result.get("memory"), note=note))
        rows.append(compare(label, "step time", "s", result.get("seconds"), note=note))
    done = {crop: r for crop, r in results.items() if "failed" not in r}
    found = forecast({crop: r["memory"] for crop, r in done.items()}, PAPER_CROP)
    total = None if found is None else (found[0] + next(iter(done.values()))["fixed"]) / 2**10
    note = "fewer than three crops fit" if found is None else f"line within {found[1]:.1%}"
    rows.append(
        compare(
            f"{name}, {PAPER_CROP}x{PAPER_CROP}",
            "forecast, weights and momentum included",
            "GiB",
            total,
            target=Target(of="value", limit=BUDGET_GIB) if FORMS[name].budget else None,
            note=note,
        )
    )
    return rows


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--crops", type=int, nargs="+", default=list(CROPS), metavar="SIDE")
    parser.add_argument("--only", default="", help="systems whose name contains this")
    parser.add_argument("--limit", type=float, default=12.0, help="GiB of memory on a CPU")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's choice")
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, metavar=("CROP", "FORM"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _restrict(limit: float) -> None:
    """Let allocations beyond the limit, or beyond what is free, fail."""
    limit_memory()
    most = min(int(limit * 2**30), resource.getrlimit(resource.RLIMIT_DATA)[0])
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def main() -> None:
    """Measure every system, print the table, write the results."""
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.measure:
        crop, name = options.measure
        side, _, limit = crop.partition("@")
        if options.device == "cpu":
            _restrict(float(limit))
        print(json.dumps(measure(FORMS[name], int(side), options.device)))
        return
    setting = Setting(device=options.device, seconds=0.0, threads=options.threads)
    rows: list[Row] = []
    details: dict[str, Any] = {}
    for name in [name for name in FORMS if options.only in name]:
        found = {
            crop: in_own_process(MODULE, f"{crop}@{options.limit}", name, setting)
            for crop in sorted(options.crops)
        }
        rows += (new := rows_of(name, found))
        print_table(new)
        details[name] = found
    where = options.device if options.device == "cuda" else f"cpu{torch.get_num_threads()}"
    content = as_json(rows, metadata(device=options.device, seed=SEED), details=details)
    print("written:", save(f"fpt_seg-{where}", content))


if __name__ == "__main__":
    main()
