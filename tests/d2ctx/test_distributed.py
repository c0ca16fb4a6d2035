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
* BatchNorm sees the images of a process: there is none but the frozen one, and the synchronised
  one of "synced", of which `tests/synced_norm.py` has a form for CPUs.

Weights and features are in float64 (Detectron2's boxes are not), which leaves nothing to rounding:
in float32, some gradients of FPT differ by 1 %.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer, create_ddp_model
from detectron2.layers import batched_nms
from detectron2.modeling.proposal_generator import proposal_utils
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from d2ctx.trainer import Trainer
from tests.d2ctx import tiny
from tests.synced_norm import synced_forward

CASES = {
    "mask_rcnn_a2fpn_lite": ("a2fpn/mask_rcnn_a2fpn_lite_instant.yaml",),
    "mask_rcnn_a2fpn": ("a2fpn/mask_rcnn_a2fpn_instant.yaml",),
    "mask_rcnn_fpt": ("fpt/mask_rcnn_fpt_instant.yaml", "MODEL.FPT.DROPBLOCK_PROB", 0.0),
    "mask_rcnn_sr": ("sr/mask_rcnn_fpn_sr_instant.yaml", "MODEL.SR.NORM", "GN"),
    "synced": (
        *("sr/mask_rcnn_fpn_sr_instant.yaml", "MODEL.RESNETS.NORM", "BN"),
        *("MODEL.BACKBONE.FREEZE_AT", 0),
    ),
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


@contextmanager
def in_float64() -> Iterator[None]:
    """Boxes stay in float32, and suppression wants scores of the same type."""
    with patch.object(proposal_utils, "batched_nms", _suppressed):
        yield


def _suppressed(boxes: torch.Tensor, scores: torch.Tensor, *rest: Any) -> torch.Tensor:
    return batched_nms(boxes, scores.float(), *rest)


def train(case: str, inputs: list[dict[str, Any]], *, seed: int) -> dict[str, Any]:
    """Some steps: what was logged at each, and the gradients of the first."""
    torch.manual_seed(seed)
    cfg = config(case)
    model = Trainer.build_model(cfg).double()
    if case == "synced":
        with torch.no_grad():
            for parameter in model.backbone.parameters():  # blocks start as identity
                parameter.add_(0.01 * torch.randn_like(parameter))
        if dist.is_initialized():
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = Trainer.build_optimizer(cfg, model)
    wrapped = create_ddp_model(model, broadcast_buffers=False, device_ids=None)
    trainer = SimpleTrainer(wrapped, [inputs] * STEPS, optimizer)
    logged, gradients = [], {}
    with in_float64(), EventStorage() as storage:
        for _ in range(STEPS):
            trainer.run_step()
            latest = storage.latest()
            logged.append({name: latest[name][0] for name in latest if "loss" in name})
            named = model.named_parameters()
            gradients = gradients or {n: p.grad.clone() for n, p in named if p.requires_grad}
            storage.step()
    statistics = {n: b for n, b in model.named_buffers() if "running" in n}
    return {"logged": logged, "gradients": gradients, "statistics": statistics}


def worker(rank: int, folder: Path) -> None:
    """One of the two processes."""
    torch.set_num_threads(1)
    nn.SyncBatchNorm.forward = synced_forward
    DistributedDataParallel._passing_sync_batchnorm_handle = lambda *_: None  # refuses CPUs
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
        assert theirs == pytest.approx(ours, rel=1e-6, abs=1e-12)
    assert one[case]["logged"][0]["total_loss"] != one[case]["logged"][1]["total_loss"]


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(case, one, two):
    expected, (first, second) = one[case]["gradients"], (x["gradients"] for x in two[case])
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert first.keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    # Some are zero but for rounding, as those of a bias in front of a softmax or a norm.
    differing = {
        name: (first[name] - gradient).norm() / gradient.norm()
        for name, gradient in expected.items()
        if (first[name] - gradient).norm() > 1e-9 * gradient.norm() + 1e-12 * largest
    }
    assert not differing


def test_synchronised_norms_have_the_statistics_of_one_process(one, two):
    ours, (first, second) = one["synced"]["statistics"], (x["statistics"] for x in two["synced"])
    assert len(ours) > 100
    torch.testing.assert_close(first, ours, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(second, ours, rtol=1e-10, atol=1e-12)
