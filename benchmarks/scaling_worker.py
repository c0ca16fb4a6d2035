"""One of the two processes of `benchmarks.scaling`: times all-reduces and training steps."""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks.communication import Network, all_reduce, buffers
from segtrain import dist
from segtrain.config.load import load_config
from segtrain.config.schema import RunConfig
from segtrain.criterion import build_criterion, count_pixels
from segtrain.models import build_model
from segtrain.train.state import TrainingState, build_state

CPU = torch.device("cpu")
NETWORKS = {
    "Segmenter": "segmenter/camvid_small",
    "SR": "sr/camvid_srnet_df1_small",
    "UFP + FPT": "fpt/camvid_fpt_small",
    "MLP, PVTv2": "mlp/camvid_mlp_small",
}
CLASSES, BATCH, CROP = 11, 4, (96, 128)
SIZES = (64, 1 << 20, 4 << 20, 16 << 20)  # bytes of all-reduces
BUCKET = 25 << 20  # DDP's, of which the first is 1 MiB
WARMUP = 2


def timed(run: Callable[[], object], rounds: int, *, on_main_only: bool = False) -> float:
    """Median seconds of the slowest process; all begin together, and some only wait."""
    seconds = []
    for number in range(WARMUP + rounds):
        dist.barrier()
        start = time.perf_counter()
        if dist.is_main() or not on_main_only:
            run()
        taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        if on_main_only and not dist.is_main():
            taken.zero_()
        if number >= WARMUP:
            seconds.append(float(dist.max_over_processes(taken)))
    return median(seconds)


Batch = dict[str, torch.Tensor]


def step(state: TrainingState, run: RunConfig, batch: Batch, *, together: bool) -> None:
    """An update without its optimizer, as the loop does it; alone it talks to nobody."""
    model = state.forward if together else state.model
    counts = count_pixels([batch]) if together else {"label": torch.tensor(1e4)}
    losses = build_criterion(run.loss)(model(batch["image"]), batch, counts)
    torch.stack(list(losses.values())).sum().backward()
    state.optimizer.zero_grad(set_to_none=True)


def network_times(name: str, rounds: int) -> dict[str, Any]:
    """One network: one process with the whole batch, both with half of it, with and without."""
    torch.manual_seed(0)
    run = config_of(NETWORKS[name])
    state = build_state(build_model(run.model, CLASSES, image_size=CROP), run, CPU)
    whole = {
        "image": torch.randn(BATCH, 3, *CROP),
        "label": torch.randint(0, CLASSES, (BATCH, *CROP)),
    }
    own = {key: value[dist.rank() :: 2] for key, value in whole.items()}
    alone = partial(step, state, run, together=False)
    found = {
        "one_s": timed(partial(alone, whole), rounds, on_main_only=True),
        "half_s": timed(partial(alone, own), rounds, on_main_only=True),
        "two_alone_s": timed(partial(alone, own), rounds),
        "two_s": timed(partial(step, state, run, own, together=True), rounds),
    }
    network = Network.of(state.model)
    size = 4 * network.parameters
    sums = 1 + max(1, -(-size // BUCKET))  # of the counts, and of the buckets
    return {
        "name": name,
        "config": f"seg/{NETWORKS[name]}",
        **found,
        "parameters": network.parameters,
        "gradient_bytes": all_reduce(size, 2),
        "buffer_bytes": buffers(network, 2),
        "messages": sums + (size > 1 << 20),
    }


def config_of(name: str) -> RunConfig:
    """A configuration of configs/seg with a small batch."""
    from benchmarks.scaling import CONFIGS

    keys = [f"train.global_batch={BATCH}", "train.micro_batch=null", "train.ema_decay=0"]
    return load_config(CONFIGS / "seg" / f"{name}.yaml", keys)


def main() -> None:
    """Measure everything; process 0 prints it as one line."""
    rounds = int(sys.argv[1])
    torch.set_num_threads(1)
    torch.cuda.is_available = lambda: False
    with dist.process_group():
        times = {}
        for size in SIZES:
            values = torch.zeros(size // 4)
            times[size] = timed(partial(dist.sum_over_processes, values), 3 * rounds)
        found = {"all_reduce_s": times, "networks": [network_times(n, rounds) for n in NETWORKS]}
        came_to = timed_notes()
        if dist.is_main():
            print(json.dumps({**found, "note_s": came_to}))


def timed_notes(count: int = 100_000) -> float:
    """Seconds that the watch costs the loop at each of its places."""
    start = time.perf_counter()
    for _ in range(count):
        dist.came_to("update 1")
    return (time.perf_counter() - start) / count


if __name__ == "__main__":
    main()
