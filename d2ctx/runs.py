"""The output folder of a run: what is written when it starts, and reading it back."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from d2ctx.compat import silence_notices
from d2ctx.config import load_config
from d2ctx.errors import UserError
from d2ctx.files import write_text


def start_run(cfg: CfgNode) -> None:
    """Prepare this process and, on the main one, the output folder.

    Logs go to the terminal and `log.txt`; the whole configuration to `config.yaml` and the
    environment to `environment.txt`, so that the terminal shows only what happens. Random
    generators are seeded from `SEED`, a different stream in each process.

    Args:
        cfg: The run's configuration.
    """
    folder, rank = Path(cfg.OUTPUT_DIR), comm.get_rank()
    if comm.is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.yaml", cfg.dump())
        write_text(folder / "environment.txt", collect_env_info() + "\n")
    comm.synchronize()
    for name in ("fvcore", "detectron2", "d2ctx"):
        setup_logger(str(folder), distributed_rank=rank, name=name)
    silence_notices()
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + rank)
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK


def run_config(run: Path) -> CfgNode:
    """The configuration a run was made with; registers its data sets.

    Raises:
        UserError: If the folder holds no `config.yaml`.
    """
    return load_config(str(_existing(run / "config.yaml", "a training run's output folder")))


def run_results(run: Path) -> dict[str, Any]:
    """Results of the last evaluation of a run.

    Raises:
        UserError: If the run was not evaluated.
    """
    return json.loads(_existing(run / "results.json", "an evaluated run").read_text())


def run_predictions(run: Path, dataset: str) -> dict[int, list[dict[str, Any]]]:
    """Detections of the last evaluation, by image id, in COCO's result format.

    Raises:
        UserError: If the data set was not evaluated in this run.
    """
    path = run / "inference" / dataset / "coco_instances_results.json"
    by_image: dict[int, list[dict[str, Any]]] = {}
    for detection in json.loads(_existing(path, f"a run evaluated on {dataset}").read_text()):
        by_image.setdefault(detection["image_id"], []).append(detection)
    return by_image


def run_metrics(run: Path) -> Iterator[dict[str, Any]]:
    """Every record that the trainer logged, in order; a record cut off by a crash is skipped.

    Raises:
        UserError: If there is no `metrics.json`.
    """
    for line in _existing(run / "metrics.json", "a training run").read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def _existing(path: Path, what: str) -> Path:
    if not path.is_file():
        raise UserError(
            f"expected {what}, but {path} does not exist; train first, or mend the path"
        )
    return path
