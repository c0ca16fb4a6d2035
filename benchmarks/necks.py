"""Necks compared on real data: same small detector, same budget, several seeds, FPN as baseline.

`python -m benchmarks.necks [--seeds 1 2 3] [--data fruits_nuts camvid]`; the data lie under
$DETECTRON2_DATASETS as `configs/d2/compare/` says. A run whose results are there is not repeated.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.common import metadata, save
from benchmarks.rows import Row, as_json, compare, print_table

ROOT = Path(__file__).resolve().parent.parent
BASELINE = "fpn"
NECKS = (BASELINE, "a2fpn_lite", "fpt", "sr")
_INSTANCES = (("bbox", "AP"), ("segm", "AP"), ("segm", "AP50"))
_PANOPTIC = (("panoptic_seg", "PQ"), ("panoptic_seg", "PQ_th"), ("panoptic_seg", "PQ_st"))
# Data set -> (task, metric) of its rows. The last two are too small to compare anything.
METRICS = {
    "fruits_nuts": _INSTANCES,
    "camvid": _PANOPTIC,
    "coco_subset": _INSTANCES,
    "coco_samples": _PANOPTIC,
}
COMPARED = ("fruits_nuts", "camvid")


def run(data: str, neck: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train and evaluate one model, unless that has been done.

    Raises:
        RuntimeError: If the run fails.
    """
    output = folder / f"{data}_{neck}_seed{seed}"
    record = output / "run.json"
    if record.exists():
        return json.loads(record.read_text())
    config = ROOT / "configs" / "d2" / "compare" / f"{data}_{neck}.yaml"
    command = [sys.executable, str(ROOT / "projects" / "train_net.py")]
    command += ["--config-file", str(config), "OUTPUT_DIR", str(output), "SEED", str(seed)]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    results = json.loads((output / "results.json").read_text())
    found = {
        "results": results,
        "seconds": time.perf_counter() - start,
        "load": os.getloadavg(),
        "commit": metadata(device="cpu", seed=seed)["commit"],
    }
    record.write_text(json.dumps(found, indent=2) + "\n")
    return found


def scores(runs: Sequence[dict[str, Any]], task: str, metric: str) -> list[float]:
    """One number per seed; an undefined score is left out."""
    found = [_find(r["results"], task, metric) for r in runs]
    return [number for number in found if number is not None]


def _find(results: dict[str, Any], task: str, metric: str) -> float | None:
    """Results stand under their data set where there are several, else at the top."""
    if task in results:
        return results[task].get(metric)
    nested = [r for r in results.values() if isinstance(r, dict) and task in r]
    return nested[0][task].get(metric) if nested else None


def rows_of(data: str, runs: dict[str, list[dict[str, Any]]]) -> list[Row]:
    """Mean over the seeds beside the baseline's, with the deviation as a note."""
    rows = []
    for task, metric in METRICS[data]:
        base = scores(runs[BASELINE], task, metric)
        for neck in runs:
            found = scores(runs[neck], task, metric)
            spread = f"+-{stdev(found):.2f} over {len(found)} seeds" if len(found) > 1 else ""
            rows.append(
                compare(
                    f"{data}: {neck}",
                    f"{task} {metric}",
                    "%",
                    mean(found) if found else None,
                    baseline="" if neck == BASELINE else BASELINE,
                    baseline_value=mean(base) if base and neck != BASELINE else None,
                    note=spread or "one seed",
                )
            )
    return rows


def main() -> None:
    """Run what is missing, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--data", nargs="+", default=list(COMPARED), choices=list(METRICS))
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "compare")
    options = parser.parse_args()
    rows: list[Row] = []
    details = {}
    for data in options.data:
        runs: dict[str, list[dict[str, Any]]] = {neck: [] for neck in NECKS}
        for seed in options.seeds:
            for neck in NECKS:
                found = run(data, neck, seed, options.output)
                runs[neck].append(found)
                details[f"{data}_{neck}_seed{seed}"] = found
                print(f"{data} {neck} seed {seed}: {found['seconds']:.0f} s", flush=True)
        rows += rows_of(data, runs)
    print_table(rows)
    seeds = {"seeds": options.seeds}
    content = as_json(rows, metadata(device="cpu", seed=options.seeds[0]) | seeds, details=details)
    name = "necks-cpu" if tuple(options.data) == COMPARED else f"necks-{'-'.join(options.data)}-cpu"
    print("written:", save(name, content))


if __name__ == "__main__":
    main()
