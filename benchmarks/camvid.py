"""Every small CamVid configuration trained with one recipe and several seeds, in one table.

`python -m benchmarks.camvid [--seeds 1 2 3] [--only TEXT] [--iters N] [--root PATH]`; the data lie
where the files say, or under $SEGTRAIN_DATASETS/camvid.

What is compared are the files configs/seg/*/camvid*_small.yaml. Trained and evaluated by the real
commands; a run whose results are there is not repeated, one that was interrupted goes on.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.common import metadata, save
from benchmarks.rows import Row, as_json, compare, print_table

ROOT = Path(__file__).resolve().parent.parent
BASELINE = "fcn"
SPLITS = ("val", "test")
FILES = ("weights", "image_counts")
FULL, LARGE = "360x480", "1024x2048"
DATASETS = "SEGTRAIN_DATASETS"
SPREAD = "+-{:.2f} over {} seeds"


def configurations() -> dict[str, Path]:
    """Name -> file; the name is what the file is called between `camvid_` and `_small`."""
    found = sorted((ROOT / "configs" / "seg").glob("*/camvid*_small.yaml"))
    return {
        path.stem.removeprefix("camvid").removesuffix("small").strip("_") or path.parent.name: path
        for path in found
        if path.parent.name != "_base_"
    }


def command(*arguments: str | Path) -> str:
    """Run `segtrain`, and return what it printed.

    Raises:
        RuntimeError: If it fails.
    """
    line = [sys.executable, "-m", "segtrain", *map(str, arguments)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(line)} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def overrides(options: argparse.Namespace) -> list[str]:
    """What goes over every file."""
    changed = [f"data.root={options.root}"] if options.root else []
    if options.iters:
        tenth = max(1, options.iters // 10)
        changed += [f"train.iters={options.iters}", f"train.eval_every={tenth}"]
        changed += [f"train.checkpoint_every={tenth}", f"schedule.warmup_iters={tenth // 2}"]
    return changed


def run(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one model and evaluate its best weights, unless that has been done."""
    folder = options.output / f"{name}_{options.iters or 'full'}_seed{seed}"
    record = folder / "run.json"
    if record.exists():
        return json.loads(record.read_text())
    start = time.perf_counter()
    if (folder / "train" / "config.yaml").exists():
        command("resume", folder / "train")
    else:
        chosen = [*overrides(options), f"train.seed={seed}", f"output={folder / 'train'}"]
        command("train", "--config", configurations()[name], *chosen)
    scores = {split: evaluate(folder / "train", split) for split in SPLITS}
    journal = (folder / "train" / "log.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in journal]
    found = {
        "miou": {split: 100 * content["miou"] for split, content in scores.items()},
        "memory_mb": max(e["memory_mb"] for e in events if e["event"] == "train"),
        "seconds": time.perf_counter() - start,
        "load": os.getloadavg(),
        "commit": metadata(device="cpu", seed=seed)["commit"],
        "scores": scores,
    }
    record.write_text(json.dumps(found, indent=2) + "\n")
    return found


def evaluate(folder: Path, split: str) -> dict[str, Any]:
    """Scores of a run's best weights, without the names of files that only this machine has."""
    found = json.loads(command("eval", folder, "--split", split, "--json"))
    return {key: value for key, value in found.items() if key not in FILES}


def cost(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Size and speed: of the recipe's training step, and of one whole image of two sizes."""
    config = configurations()[name]
    parts = json.loads(command("analyze", "--config", config, "--size", FULL, "--json"))
    line = ["bench", "--config", config, "--seconds", str(options.seconds), "--json"]
    (image,), (large,) = (
        json.loads(command(*line, "--inference", "--size", size)) for size in (FULL, LARGE)
    )
    training = json.loads(command(*line, "--batch", "8"))[1]
    return {
        "parameters": parts["total"]["parameters"] / 1e6,
        "macs": parts["total"]["macs"] / 1e9,
        "images": image["images_per_second"],
        "large": large["images_per_second"],
        "step": training["median_ms"],
    }


def rows_of(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], costs: Mapping[str, Mapping[str, float]]
) -> list[Row]:
    """Scores as means over the seeds beside the baseline's, then size and speed."""
    rows = []
    for split in SPLITS:
        scores = {name: [r["miou"][split] for r in found] for name, found in runs.items()}
        base = scores.get(BASELINE)
        for name, values in scores.items():
            spread = SPREAD.format(stdev(values), len(values)) if len(values) > 1 else "one seed"
            other = base if name != BASELINE else None
            rows.append(
                compare(
                    name,
                    f"mIoU, {split}",
                    "%",
                    mean(values),
                    baseline=BASELINE if other else "",
                    baseline_value=mean(other) if other else None,
                    note=spread,
                )
            )
    for name, found in costs.items():
        memory = max(r["memory_mb"] for r in runs[name])
        rows += [
            compare(name, "parameters", "M", found["parameters"]),
            compare(name, f"MACs of {FULL}", "G", found["macs"]),
            compare(name, f"images per second, {FULL}", "1/s", found["images"]),
            compare(name, f"images per second, {LARGE}", "1/s", found["large"]),
            compare(name, "training step, 8 crops", "ms", found["step"]),
            compare(name, "memory of the training process", "MB", memory),
        ]
    return rows


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    parser.add_argument("--iters", type=int, default=0, help="0: as the recipe says")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each timing")
    datasets = os.environ.get(DATASETS)
    root = Path(datasets) / "camvid" if datasets else None
    parser.add_argument(
        "--root",
        type=Path,
        default=root,
        help="CamVid; default: the files' own",
    )
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "camvid")
    options = parser.parse_args(arguments)
    options.output = options.output.resolve()
    options.root = options.root.resolve() if options.root else None
    return options


def main() -> None:
    """Run what is missing, print the table, write the results."""
    options = parse()
    names = [name for name in configurations() if options.only in name]
    if not names:
        known = ", ".join(configurations())
        raise SystemExit(f"no configuration contains {options.only!r}; known: {known}")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for seed in options.seeds:
        for name in names:
            runs[name].append(found := run(name, seed, options))
            scores = ", ".join(f"{split} {found['miou'][split]:.2f}" for split in SPLITS)
            print(f"{name} seed {seed}: {scores} ({found['seconds']:.0f} s)", flush=True)
    costs = {name: cost(name, options) for name in names}
    rows = rows_of(runs, costs)
    print_table(rows)
    about = {"seeds": options.seeds, "iters": options.iters or "recipe"}
    facts = metadata(device="cpu", seed=options.seeds[0]) | about
    content = as_json(rows, facts, details={"runs": runs, "costs": costs})
    print("written:", save(f"camvid-cpu{torch.get_num_threads()}", content))


if __name__ == "__main__":
    main()
