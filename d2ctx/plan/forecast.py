"""What a run will need: memory of an update, hours, disk."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from d2ctx.plan.report import NO_MEMORY

GIB = 1 << 30
_CGROUP = Path("/sys/fs/cgroup/memory.max")
_MEASURED = 2  # images in the measured pass: batch norms need two where maps are small
# Numbers for each weight: itself, its gradient, what the optimizer keeps.
_PER_WEIGHT = {"SGD": 3, "AdamW": 4}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Forecast of the peak of training, in bytes.

    Attributes:
        fixed: Weights, gradients, state of the optimizer.
        kept: What the backward pass keeps of one image at the largest size.
        images: Images of one process's batch.
        there: Memory of the device; None where the system does not tell.
        size: Height and width of that image.
    """

    fixed: int
    kept: int
    images: int
    there: int | None
    size: tuple[int, int]

    @property
    def peak(self) -> int:
        """All together."""
        return self.fixed + self.kept * self.images

    def problem(self) -> str | None:
        """Why the run will not fit, with the fix; None where it fits."""
        if self.there is None or self.peak <= self.there:
            return None
        return (
            f"training needs {gib(self.peak)} with {self.images} images in a process, there are "
            f"{gib(self.there)}; {NO_MEMORY}"
        )


def forecast_memory(
    model: nn.Module, cfg: CfgNode, records: Sequence[dict[str, Any]], *, images: int
) -> Memory:
    """Measure what a forward pass of one or two images keeps for the backward pass.

    The image is the one that is largest after resizing; a whole batch of it is the worst case.
    What libraries take besides is left out.

    Args:
        model: As it is trained; its batch norms see the images.
        cfg: Of the run.
        records: Data-set dicts of the training set.
        images: Images of one process's batch.

    Returns:
        The forecast.
    """
    few = min(_MEASURED, images)
    sample = _largest(cfg, records)
    device = torch.device(cfg.MODEL.DEVICE)
    parameters = [p for p in model.parameters() if p.requires_grad]
    frozen = sum(_bytes(t) for t in model.state_dict().values())
    trained = sum(_bytes(p) for p in parameters)
    per_weight = _PER_WEIGHT[cfg.SOLVER.OPTIMIZER] - 1
    return Memory(
        fixed=frozen + per_weight * trained,
        kept=_kept(model, [sample] * few, amp=cfg.SOLVER.AMP.ENABLED, device=device) // few,
        images=images,
        there=memory_of(device),
        size=tuple(sample["image"].shape[-2:]),
    )


def _largest(cfg: CfgNode, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The record with most pixels after resizing, as the model takes it, without a crop."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.CROP.ENABLED = False
    cfg.INPUT.MIN_SIZE_TRAIN = (max(cfg.INPUT.MIN_SIZE_TRAIN),)
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
    with_objects = [r for r in records if r.get("annotations")] or list(records)

    def pixels(record: dict[str, Any]) -> float:
        short, long = sorted((record["height"], record["width"]))
        scale = min(cfg.INPUT.MIN_SIZE_TRAIN[0] / short, cfg.INPUT.MAX_SIZE_TRAIN / long)
        return short * long * scale**2

    return DatasetMapper(cfg, is_train=True)(max(with_objects, key=pixels))


def _kept(model: nn.Module, batch: list[dict[str, Any]], *, amp: bool, device: torch.device) -> int:
    """Bytes of all storages that autograd saves, each once, weights left out."""
    own = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    found: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return value

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value)
    with EventStorage(), hooks, torch.autocast(device.type, enabled=amp):
        losses = model.train()(batch)  # kept alive: a freed place would be counted once for two
    del losses
    return sum(found.values())


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def memory_of(device: torch.device) -> int | None:
    """Free memory of a GPU; all memory that this process may have on a CPU.

    Args:
        device: Where the run will be.

    Returns:
        Bytes; None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
    try:
        return min(there, int(_CGROUP.read_text()))  # what a container may have
    except (OSError, ValueError):
        return there


def peak_memory(device: torch.device) -> int | None:
    """Most memory that this process has taken.

    Args:
        device: Of the model.

    Returns:
        Bytes; None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def expected_seconds(
    cfg: CfgNode, *, update: float, image: float, images: int, save: float
) -> dict[str, float]:
    """How long the run will take on this machine.

    Args:
        cfg: Of the run, after scaling.
        update: Seconds of an update.
        image: Seconds of one image of the evaluation.
        images: Images of an evaluation.
        save: Seconds of a checkpoint.

    Returns:
        Seconds of training, evaluation and saving.
    """
    iters, every = cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD
    evaluations = -(-iters // every) if every > 0 else 1
    return {
        "training": update * iters,
        "evaluation": image * images * evaluations,
        "saving": save * checkpoints(cfg),
    }


def checkpoints(cfg: CfgNode) -> int:
    """How many checkpoints a run leaves: one for each period, and the last.

    Args:
        cfg: Of the run, after scaling.

    Returns:
        The count.
    """
    return cfg.SOLVER.MAX_ITER // cfg.SOLVER.CHECKPOINT_PERIOD + 1


def disk_free(folder: Path) -> int:
    """Free bytes of the disk of a folder.

    Args:
        folder: Exists.

    Returns:
        Bytes.
    """
    return shutil.disk_usage(folder).free


def gib(size: float) -> str:
    """A size for people.

    Args:
        size: Bytes.

    Returns:
        GiB, or MiB where it is less than one.
    """
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    Args:
        seconds: Not negative.

    Returns:
        Such as "1:02:03".
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
