"""Content-aware reassembly: time and peak memory of every method against unfold.

`python -m benchmarks.reassembly [--size 50 100] [--compiled] [--device cuda]`
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import metadata, peak_growth_mib, save, summary, time_phases
from ctxops import normalize_kernels, reassemble_down, reassemble_up

BASELINE = "unfold"
CHANNELS = 256
KERNEL_SIZE = 5
SEED = 0
# A loop is slow and needs no warm-up beyond this; compilation happens in it.
WARMUP = 1


def unfold_up(x: Tensor, kernels: Tensor) -> Tensor:
    """Every window of the coarse map copied out, then one product with the four sub-pixels."""
    batch, channels, height, width = x.shape
    windows = F.unfold(x, KERNEL_SIZE, padding=KERNEL_SIZE // 2)
    windows = windows.view(batch, channels, KERNEL_SIZE**2, height, width)
    out = torch.einsum("bckhw,bkqhw->bcqhw", windows, kernels)
    return F.pixel_shuffle(out.flatten(1, 2), 2)


def unfold_down(x: Tensor, kernels: Tensor) -> Tensor:
    """Every window of the fine map copied out, multiplied and summed."""
    windows = F.unfold(x, KERNEL_SIZE, padding=KERNEL_SIZE // 2, stride=2)
    windows = windows.view(*x.shape[:2], KERNEL_SIZE**2, *kernels.shape[-2:])
    return torch.einsum("bckhw,bkhw->bchw", windows, kernels[:, :, 0])


def operator(direction: str, method: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The function (x, kernels) -> out of a direction and method."""
    if method == BASELINE:
        return unfold_up if direction == "up" else unfold_down
    if method == "compiled":
        return torch.compile(operator(direction, "auto"), fullgraph=True)
    if direction == "up":
        return lambda x, kernels: reassemble_up(x, kernels, impl=method)
    return lambda x, kernels: reassemble_down(x, kernels, stride=2, impl=method)


def measure(direction: str, size: int, method: str, device: str, seconds: float) -> dict[str, Any]:
    """Forward and backward pass of one case; `size` is that of the coarse map."""
    torch.manual_seed(SEED)
    scale, extent = (2, size) if direction == "up" else (1, 2 * size)
    x = torch.randn(1, CHANNELS, extent, extent).to(device).requires_grad_()
    logits = torch.randn(1, KERNEL_SIZE**2 * scale**2, size, size).to(device)
    kernels = normalize_kernels(logits, kernel_size=KERNEL_SIZE, scale=scale).requires_grad_()
    run = operator(direction, method)
    grad = torch.randn_like(run(x, kernels).detach())
    state: dict[str, Tensor] = {}

    def forward() -> None:
        state["out"] = run(x, kernels)

    def backward() -> None:
        torch.autograd.grad(state.pop("out"), (x, kernels), grad)

    def both() -> None:
        forward()
        backward()

    times = time_phases([forward, backward], device=device, warmup=WARMUP, seconds=seconds)
    return {
        "direction": direction,
        "size": size,
        "method": method,
        "forward": summary(times[0]),
        "backward": summary(times[1]),
        "total": summary([sum(pair) for pair in zip(*times, strict=True)]),
        "peak_growth_mib": peak_growth_mib(both, device=device),
    }


def in_own_process(case: list[str]) -> dict[str, Any]:
    """Measure one case in a fresh process, so that no other leaves memory or threads behind."""
    command = [sys.executable, "-m", "benchmarks.reassembly", "--case", *case]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"case {' '.join(case)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def print_table(results: list[dict[str, Any]]) -> None:
    header = f"{'':5}{'size':>5} {'method':9}{'forward ms':>20}{'backward ms':>20}{'peak MiB':>10}"
    print(f"{header}{'time vs ' + BASELINE:>16}{'memory vs ' + BASELINE:>18}")
    for row in results:
        case = row["direction"], row["size"]
        base = next(
            r for r in results if (r["direction"], r["size"], r["method"]) == (*case, BASELINE)
        )
        cells = [
            f"{p['median_ms']:.1f} (IQR {p['iqr_ms']:.1f})"
            for p in (row["forward"], row["backward"])
        ]
        time_ratio = row["total"]["median_ms"] / base["total"]["median_ms"]
        memory_ratio = row["peak_growth_mib"] / base["peak_growth_mib"]
        print(
            f"{case[0]:5}{case[1]:5} {row['method']:9}{cells[0]:>20}{cells[1]:>20}"
            f"{row['peak_growth_mib']:10.1f}{time_ratio:16.3f}{memory_ratio:18.3f}"
        )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs="+", default=[50, 100], help="coarse map, square")
    parser.add_argument("--compiled", action="store_true", help="also under torch.compile")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's choice")
    parser.add_argument("--seconds", type=float, default=4.0, help="measured time per case")
    parser.add_argument(
        "--case", nargs=3, metavar=("DIRECTION", "SIZE", "METHOD"), help=argparse.SUPPRESS
    )
    return parser.parse_args(arguments)


def main() -> None:
    """Measure every case, print the table, write the results."""
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.case:
        direction, size, method = options.case
        print(json.dumps(measure(direction, int(size), method, options.device, options.seconds)))
        return
    methods = [BASELINE, "loop", "chunked"] + ["compiled"] * options.compiled
    common = ["--device", options.device, "--seconds", str(options.seconds)]
    common += ["--threads", str(options.threads)] if options.threads else []
    results = [
        in_own_process([direction, str(size), method, *common])
        for direction in ("up", "down")
        for size in options.size
        for method in methods
    ]
    print_table(results)
    setting = {"batch": 1, "channels": CHANNELS, "kernel_size": KERNEL_SIZE, "factor": 2}
    content = {
        "what": "reassemble_up and reassemble_down, float32, forward and backward",
        "baseline": BASELINE,
        "setting": {**setting, "size": "height and width of the coarse map"},
        "metadata": metadata(device=options.device, seed=SEED),
        "results": results,
    }
    where = options.device if options.device == "cuda" else f"cpu{torch.get_num_threads()}"
    print("written:", save(f"reassembly-{where}", content))


if __name__ == "__main__":
    main()
