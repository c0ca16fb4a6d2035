"""Communication of every network, and two processes on a CPU beside the cost model.

`python -m benchmarks.scaling [--model-only] [--rounds N]`

The table needs no memory: models are built without it. The measurement trains small networks by one
process and by two, with gloo, a thread each, at the same global batch, and compares the step with

    the same share without communication, both processes at once + bytes / bandwidth + latencies
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import metadata, save
from benchmarks.communication import (
    Network,
    buffers,
    evaluation,
    fit,
    gradients,
    shards,
    synced_norms,
)

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SEMANTIC = {
    "Segmenter L/16": "segmenter/ade20k_l16_mask_640",
    "Segmenter B/16": "segmenter/ade20k_b16_mask",
    "SR, ResNet-50": "sr/cityscapes_r50_sr",
    "UN-EPT, ResNet-50": "unept/ade20k_unept_r50",
    "UFP + FPT, ResNet-101": "fpt/ade20k_ufp_fpt",
}
DETECTORS = {
    "Mask R-CNN, A²-FPN": "a2fpn/mask_rcnn_r50_a2fpn_1x",
    "Mask R-CNN, FPT": "fpt/mask_rcnn_r50_fpt_1x",
    "Mask R-CNN, SR-ResNet": "sr/mask_rcnn_r50_fpn_sr_1x",
    "Hybrid Task Cascade, A²-FPN": "a2fpn/htc_r50_a2fpn_20e",
}
PROCESSES = (2, 8, 64)
WORKER = "benchmarks.scaling_worker"


def semantic_model(name: str) -> tuple[nn.Module, int]:
    """A network of configs/seg without memory, and its classes."""
    from segtrain.config.load import load_config
    from segtrain.data.datasets import named_layout
    from segtrain.models import build_model

    config = load_config(CONFIGS / "seg" / f"{name}.yaml")
    classes = len(named_layout(config.data.dataset, Path("none")).classes)
    with torch.device("meta"):
        return build_model(config.model, classes, image_size=config.data.crop), classes


def detector(name: str) -> nn.Module:
    """A model of configs/d2 without memory."""
    from detectron2.modeling import build_model

    from d2ctx.config import load_config

    opts = ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "meta"]
    with torch.device("meta"):
        return build_model(load_config(str(CONFIGS / "d2" / f"{name}.yaml"), opts))


def costs() -> Iterator[dict[str, Any]]:
    """MB that a process sends in one update of one pass, for every network and number of them."""
    for name, path in SEMANTIC.items():
        model, classes = semantic_model(path)
        yield {"name": name, "config": f"seg/{path}", **_costs(Network.of(model), classes)}
    for name, path in DETECTORS.items():
        yield {"name": name, "config": f"d2/{path}", **_costs(Network.of(detector(path)), None)}


def _costs(network: Network, classes: int | None) -> dict[str, Any]:
    """Of one network; detectors send no buffers and have no shards and no confusion matrix."""
    rows: dict[str, Any] = {"parameters": network.parameters, "batch_norms": len(network.norms)}
    for n in PROCESSES:
        sent = {"gradients": gradients(network, n), "synced_norms": synced_norms(network, n)}
        if classes is not None:
            sent["buffers"] = buffers(network, n)
            sent["fsdp_bf16_weights"] = shards(network, n, weight_bytes=2)
            sent["evaluation"] = evaluation(classes, n)
        rows[f"mb_sent_by_each_of_{n}"] = {key: value / 1e6 for key, value in sent.items()}
    return rows


def measure(rounds: int) -> dict[str, Any]:
    """Run the two processes; what process 0 found, with the prediction beside it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", WORKER, str(rounds)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [worker.communicate()[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    found = json.loads(said[0].splitlines()[-1])
    times = {int(size): seconds for size, seconds in found["all_reduce_s"].items()}
    link = fit(times, 2)
    for row in found["networks"]:
        sent = row["gradient_bytes"] + row["buffer_bytes"]
        row["communication_predicted_s"] = link.seconds(sent, messages=row["messages"])
        row["communication_measured_s"] = row["two_s"] - row["two_alone_s"]
        row["two_predicted_s"] = row["two_alone_s"] + row["communication_predicted_s"]
        row["speedup"] = row["one_s"] / row["two_s"]
        row["predicted_speedup"] = row["one_s"] / row["two_predicted_s"]
    found["link"] = {"latency_s": link.latency, "bytes_per_second": link.bandwidth}
    return found


def main() -> None:
    """Parse the command line, compute, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-only", action="store_true", help="measure nothing")
    parser.add_argument("--rounds", type=int, default=7, help="measured steps of each form")
    options = parser.parse_args()
    content: dict[str, Any] = {"costs": list(costs())}
    for row in content["costs"]:
        print(row["name"], json.dumps(row["mb_sent_by_each_of_8"]))
    if options.model_only:
        return
    content["measured"] = measure(options.rounds)
    for row in content["measured"]["networks"]:
        print(json.dumps(row))
    print(json.dumps(content["measured"]["link"]))
    print("written:", save("scaling-cpu2", {"metadata": metadata(device="cpu", seed=0), **content}))


if __name__ == "__main__":
    main()
