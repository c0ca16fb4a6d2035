"""Two processes that share the images score what one process scores: AP and PQ, bit for bit.

The images are dealt by Detectron2's loader, in every process by itself; the model is one that says
of an image what its number makes it say.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import inference_on_dataset
from detectron2.structures import Boxes, Instances
from torch import nn

from d2ctx import build_evaluator
from tests.d2ctx.toy_coco import toy_config, write_toy
from tests.d2ctx.toy_panoptic import IDS, panoptic_config, panoptic_ids, write_panoptic

pytestmark = [pytest.mark.usefixtures("isolated"), pytest.mark.timeout(900)]
SPLITS = (1, 2, 5)  # images: none for one process, as many for both, one more for one


class Guesses(nn.Module):
    """Detections near the truth with few different scores, and a panoptic map with errors."""

    def forward(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [self._of(image) for image in inputs]

    def _of(self, image: dict[str, Any]) -> dict[str, Any]:
        draw = np.random.default_rng(image["image_id"])
        size, count = (image["height"], image["width"]), 6
        corners = torch.from_numpy(4 + draw.normal(0, 1.5, (count, 2))).float()
        found = Instances(size, pred_boxes=Boxes(torch.cat([corners, corners + 16], dim=1)))
        found.scores = torch.from_numpy(draw.integers(1, 5, count) / 5)  # equal ones: order matters
        found.pred_classes = torch.from_numpy(draw.integers(0, 2, count))
        found.pred_masks = torch.zeros(count, *size, dtype=torch.bool)
        for mask, (x, y) in zip(found.pred_masks, corners.round().int().tolist(), strict=True):
            mask[y : y + 16, x : x + 16] = True
        ids = np.where(panoptic_ids() == IDS[7], 0, panoptic_ids()).astype(np.int32)
        ids[: int(draw.integers(1, 24))] = IDS[4]  # more sky than there is
        segments = [
            {"id": IDS[4], "isthing": False, "category_id": 1},
            {"id": IDS[9], "isthing": False, "category_id": 2},
            {"id": IDS[12], "isthing": True, "category_id": 1, "score": 0.9, "instance_id": 0},
        ]
        return {"instances": found, "panoptic_seg": (torch.from_numpy(ids), segments)}


def configs(folder: Path) -> dict[str, CfgNode]:
    """One for each data set, by its name; all are registered."""
    made = {}
    for images in SPLITS:
        toy = write_toy(folder / "coco", f"toy_coco_{images}", images=images)
        made[toy.name] = toy_config(train=[], test=[toy], output=folder)
        toy = write_panoptic(folder / "panoptic", f"toy_panoptic_{images}", images=images)
        sets = {"COCO_PANOPTIC": {toy.name: toy.entry()}}
        made[toy.name] = panoptic_config(train=[], test=[toy.name], output=folder, **sets)
    return made


def scores(cfgs: dict[str, CfgNode], output: Path) -> dict[str, Any]:
    """What an evaluation of each data set gives, as text, and how many images it was of."""
    found = {}
    for name, cfg in cfgs.items():
        cfg = cfg.clone()
        cfg.defrost()
        cfg.OUTPUT_DIR, cfg.DATALOADER.NUM_WORKERS = str(output), 0
        loader = build_detection_test_loader(cfg, name)
        results = inference_on_dataset(Guesses(), loader, build_evaluator(cfg, name))
        found[name] = {"results": repr(dict(results)), "images": len(loader)}
    return found


def worker(rank: int, cfgs: dict[str, CfgNode], folder: Path) -> None:
    """One of the two processes; PNGs of a panoptic prediction go to one folder of both."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    instances = {name: cfg for name, cfg in cfgs.items() if "coco" in name}
    found = scores(instances, folder / f"out{rank}")
    found |= scores({n: c for n, c in cfgs.items() if n not in instances}, folder / "shared")
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_scores_and_files_are_those_of_one_process(tmp_path):
    cfgs = configs(tmp_path)
    expected = scores(cfgs, tmp_path / "one")
    # Forked, because importing everything anew takes longer than the rest.
    mp.start_processes(worker, (cfgs, tmp_path), nprocs=2, start_method="fork")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for name, one in expected.items():
        assert first[name]["results"] == one["results"], name
        assert second[name]["results"] == "{}"  # none but the main process knows
        # Each image once: none is repeated so that all have as many.
        assert first[name]["images"] + second[name]["images"] == one["images"]
    shares = [second[f"toy_coco_{images}"]["images"] for images in SPLITS]
    assert shares == [0, 1, 2]
    many = expected["toy_coco_5"]["results"]
    assert "'AP': " in many
    assert not any(text in many for text in ("'AP': 0.0", "'AP': nan", "'AP': 100.0"))
    assert "'PQ': " in expected["toy_panoptic_5"]["results"]
    written = files(tmp_path / "out0") | files(tmp_path / "shared")
    assert written == files(tmp_path / "one")
    assert not files(tmp_path / "out1")
