"""What a run will need: memory of a pass, hours, disk."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from segtrain.analyze import analyze, optimizer_bytes
from segtrain.config.schema import RunConfig, TrainConfig
from segtrain.train.checkpoint import FOLDER
from segtrain.train.state import micro_batch

GIB = 1 << 30
_ROOM = 0.9  # of the memory; the rest is for libraries, buffers and fragments
_CGROUP = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Forecast of the peak of training, in bytes.

    Attributes:
        fixed: Weights, gradients, state of the optimizer.
        kept: What the backward pass of one micro batch keeps.
        images: Images of the micro batch.
        there: Memory of the device; None where the system does not tell.
    """

    fixed: int
    kept: int
    images: int
    there: int | None

    @property
    def peak(self) -> int:
        """All together."""
        return self.fixed + self.kept

    def problem(self, options: TrainConfig) -> str | None:
        """Why the run will not fit, with the fix.

        Args:
            options: The section `train`.

        Returns:
            One line, or None where it fits.
        """
        if self.there is None or self.peak <= self.there:
            return None
        room = _ROOM * self.there - self.fixed
        most = int(room * self.images / max(1, self.kept))
        fits = [m for m in range(1, min(most, self.images) + 1) if not options.global_batch % m]
        fix = (
            f"write train.micro_batch: {fits[-1]}"
            if fits
            else "lower data.crop, take a smaller model or a larger device"
        )
        return (
            f"training needs {gib(self.peak)} with {self.images} images in a pass, there are "
            f"{gib(self.there)}; {fix}"
        )


def forecast_memory(config: RunConfig, num_classes: int, device: torch.device) -> Memory:
    """Forecast the peak of training from shapes alone.

    Args:
        config: Of the run.
        num_classes: K.
        device: Where the run will be.

    Returns:
        The forecast for one process.

    Raises:
        UserError: If the model contradicts itself, or the batch cannot be split.
    """
    images = micro_batch(config.train)
    costs = analyze(config, num_classes=num_classes, size=config.data.crop, batch=images)
    total = costs["total"]
    return Memory(
        fixed=optimizer_bytes(config, total.parameters),
        kept=total.kept,
        images=images,
        there=_memory_of(device),
    )


def _memory_of(device: torch.device) -> int | None:
    """Free memory of a GPU; all memory that this process may have on a CPU."""
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


def times_due(iters: int, *every: int | None) -> int:
    """After how many updates something is done that is done every so many, and at the end.

    Args:
        iters: Updates of the run.
        *every: Updates from one time to the next; None is at the end only.

    Returns:
        The count.
    """
    return len({iters}.union(*(range(n, iters, n) for n in every if n)))


def expected_seconds(
    options: TrainConfig, *, update: float, image: float, images: int, save: float
) -> dict[str, float]:
    """How long the run will take on this machine.

    Args:
        options: The section `train`.
        update: Seconds of an update.
        image: Seconds of one image of the evaluation.
        images: Images of an evaluation.
        save: Seconds of a checkpoint.

    Returns:
        Seconds of training, evaluation and saving.
    """
    iters, evaluating = options.iters, options.eval_every
    return {
        "training": update * iters,
        "evaluation": image * images * times_due(iters, evaluating),
        "saving": save * times_due(iters, evaluating, options.checkpoint_every),
    }


def disk_needed(folder: Path, *, keep: int) -> int:
    """Most disk that checkpoints will take.

    Args:
        folder: Of a run with one checkpoint, its weights among it.
        keep: How many the real run keeps.

    Returns:
        Bytes: those that are kept, the best weights, and the one that is being written.
    """
    place = folder / FOLDER
    state, weights = (place / f"last{end}" for end in (".pt", ".safetensors"))
    one = state.stat().st_size + weights.stat().st_size
    return (keep + 1) * one + weights.stat().st_size


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
