"""Two processes with an image each train like one process with both: losses and gradients.

The model and the optimizer are those of `d2ctx.trainer`, in Detectron2's `SimpleTrainer`:
`DefaultTrainer` asks for GPUs where there are several processes. What depends on which images a
process has is kept equal by the inputs:

* Padding: all images have one size, which is divisible by what the backbones ask for.
* Box and mask losses are means over the regions of a process. Here all proposals are sampled, as
  many of each image, and nothing but the ground truth is close enough to it to be positive, so that
  each image has two positives. Nothing is drawn at random.
* Detectron2's semantic head (Panoptic FPN) takes the mean over the pixels of a process: both images
  know as many. The branch of Hybrid Task Cascade counts over all processes: there they differ.
* BatchNorm sees the images of a process: there is none but the frozen one.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer, create_ddp_model
from detectron2.utils.events import EventStorage

from d2ctx.trainer import Trainer
from tests.d2ctx import tiny

CASES = {
    "mask_rcnn_a2fpn_lite": ("a2fpn/mask_rcnn_a2fpn_lite_instant.yaml",),
    "mask_rcnn_sr": ("sr/mask_rcnn_fpn_sr_instant.yaml", "MODEL.SR.NORM", "GN"),
    "htc": ("a2fpn/htc_a2fpn_instant.yaml",),
    "panoptic_fpn": ("panoptic/panoptic_fpn_a2fpn_lite_instant.yaml",),
}
KNOWN_ROWS = {"htc": (100, 24)}  # of each image's label map
STEPS, STRICT, MANY = 2, 0.97, 10_000


def config(case: str) -> CfgNode:
    name, *opts = CASES[case]
    return tiny.config(
        name,
        *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", MANY, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 24),
        *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", MANY, "MODEL.ROI_HEADS.POSITIVE_FRACTION", 0.5),
        *("MODEL.ROI_HEADS.IOU_THRESHOLDS", [STRICT]),
        *("MODEL.ROI_BOX_CASCADE_HEAD.IOUS", (STRICT,) * 3),
        # With this, activations stay small in a random ResNet without working norms.
        *("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.PIXEL_STD", [6400.0] * 3),
        # Clipping would hide a wrong scale of all gradients, and AdamW any scale.
        *("SOLVER.CLIP_GRADIENTS.ENABLED", False, "SOLVER.OPTIMIZER", "SGD"),
        *("SOLVER.BASE_LR", 0.01, *opts),
    )


def images(case: str) -> list[dict[str, Any]]:
    inputs = tiny.batch(height=128, width=128)
    inputs[1]["instances"].gt_boxes.tensor[:] += 3
    inputs[1]["sem_seg"] = 1 - inputs[1]["sem_seg"]
    for image, rows in zip(inputs, KNOWN_ROWS.get(case, (100, 100)), strict=True):
        image["sem_seg"][rows:] = 255
    return inputs


def train(case: str, inputs: list[dict[str, Any]], *, seed: int) -> dict[str, Any]:
    """Some steps: what was logged at each, and the gradients of the first."""
    torch.manual_seed(seed)
    cfg = config(case)
    model = Trainer.build_model(cfg)
    optimizer = Trainer.build_optimizer(cfg, model)
    wrapped = create_ddp_model(model, broadcast_buffers=False, device_ids=None)
    trainer = SimpleTrainer(wrapped, [inputs] * STEPS, optimizer)
    logged, gradients = [], {}
    with EventStorage() as storage:
        for _ in range(STEPS):
            trainer.run_step()
            latest = storage.latest()
            logged.append({name: latest[name][0] for name in latest if "loss" in name})
            named = model.named_parameters()
            gradients = gradients or {n: p.grad.clone() for n, p in named if p.requires_grad}
            storage.step()
    return {"logged": logged, "gradients": gradients}


def worker(rank: int, folder: Path) -> None:
    """One of the two processes."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    for case in CASES:
        # Each starts from other weights: those of the first must count.
        found = train(case, images(case)[rank : rank + 1], seed=rank)
        torch.save(found, folder / f"{case}_{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each process found, by case; they start once for all, because that takes seconds."""
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(worker, (folder,), nprocs=2)
    return {case: [torch.load(folder / f"{case}_{rank}.pt") for rank in (0, 1)] for case in CASES}


@pytest.fixture(scope="module")
def one():
    """What one process finds with both images, by case."""
    return {case: train(case, images(case), seed=0) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_losses_as_logged_are_those_of_one_process(case, one, two):
    assert len(one[case]["logged"]) == STEPS
    for ours, theirs in zip(one[case]["logged"], two[case][0]["logged"], strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-7)
    assert one[case]["logged"][0]["total_loss"] != one[case]["logged"][1]["total_loss"]


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(case, one, two):
    expected, (first, second) = one[case]["gradients"], (x["gradients"] for x in two[case])
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert first.keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    # Some are zero but for rounding, as those of a bias in front of a softmax.
    differing = {
        name: (first[name] - gradient).norm() / gradient.norm()
        for name, gradient in expected.items()
        if (first[name] - gradient).norm() > 2e-3 * gradient.norm() + 1e-7 * largest
    }
    assert not differing
