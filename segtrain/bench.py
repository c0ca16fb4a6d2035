"""Images per second of a model, forward alone and as a training step, on this machine.

Random images and labels: what is measured is the model, not the loading of data.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor, nn

from ctxops.losses import cross_entropy
from segtrain.config.schema import RunConfig
from segtrain.errors import UserError
from segtrain.models import build_model
from segtrain.optim import build_optimizer

MIN_ROUNDS = 3
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What was measured.

    Attributes:
        what: `inference` or `training step`.
        images_per_second: Batch / median.
        median_ms: Of one batch.
        iqr_ms: Inter-quartile range.
        rounds: Measured batches.
        peak_mib: Peak memory of the GPU; None on a CPU.
    """

    what: str
    images_per_second: float
    median_ms: float
    iqr_ms: float
    rounds: int
    peak_mib: float | None

    def __str__(self) -> str:
        memory = "" if self.peak_mib is None else f", {self.peak_mib:,.0f} MiB"
        return (
            f"{self.what:14} {self.images_per_second:8.2f} images/s  (median {self.median_ms:.1f} "
            f"ms, inter-quartile range {self.iqr_ms:.1f} ms, {self.rounds} rounds{memory})"
        )


def bench(
    config: RunConfig,
    *,
    num_classes: int,
    size: tuple[int, int],
    batch: int,
    device: str,
    seconds: float,
    training: bool = True,
) -> list[Speed]:
    """Measure inference and training.

    Args:
        config: The run; its precision, channels_last and compile are used.
        num_classes: K.
        size: (H, W) of the images.
        batch: Images at once.
        device: `cpu` or `cuda`.
        seconds: Measured time for each of the two.
        training: False measures inference alone.

    Returns:
        Inference, then the training step.

    Raises:
        UserError: If there is no such device, or fp16 is asked for on a CPU.
    """
    _check(config, device)
    torch.manual_seed(config.train.seed)
    model = build_model(config.model, num_classes, image_size=config.data.crop).to(device)
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    model = model.to(memory_format=layout)
    image = torch.randn(batch, 3, *size).to(device=device, memory_format=layout)
    run = torch.compile(model) if config.train.compile else model
    steps = {"inference": _inference(model, run, image, config, device)}
    if training:
        labels = torch.randint(num_classes, (batch, *size)).to(device)
        steps["training step"] = _training(model, run, image, labels, config, device)
    return [
        _measure(what, step, batch=batch, device=device, seconds=seconds)
        for what, step in steps.items()
    ]


def as_dict(speeds: list[Speed]) -> list[dict[str, Any]]:
    """The results for JSON.

    Args:
        speeds: From `bench`.

    Returns:
        One mapping each.
    """
    return [asdict(speed) for speed in speeds]


def _check(config: RunConfig, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU that PyTorch sees; use --device cpu")
    if device == "cpu" and config.train.precision == "fp16":
        raise UserError("train.precision fp16 needs a GPU; write train.precision=bf16")


def _autocast(config: RunConfig, device: str) -> AbstractContextManager[object]:
    dtype = _TYPES[config.train.precision]
    low = dtype != torch.float32
    return torch.autocast(device, dtype=dtype if low else torch.bfloat16, enabled=low)


def _inference(
    model: nn.Module, run: Callable[[Tensor], Any], image: Tensor, config: RunConfig, device: str
) -> Callable[[], None]:
    def step() -> None:
        model.eval()
        with torch.inference_mode(), _autocast(config, device):
            run(image)

    return step


def _training(
    model: nn.Module,
    run: Callable[[Tensor], Any],
    image: Tensor,
    labels: Tensor,
    config: RunConfig,
    device: str,
) -> Callable[[], None]:
    optimizer = build_optimizer(model, config.optim)
    scaler = torch.amp.GradScaler(device, enabled=config.train.precision == "fp16")

    def step() -> None:
        model.train()
        with _autocast(config, device):
            logits = run(image)["logits"]
        scaler.scale(cross_entropy(logits, labels)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def _measure(
    what: str, step: Callable[[], None], *, batch: int, device: str, seconds: float
) -> Speed:
    cuda = device == "cuda"
    step()  # warm-up: allocation, compilation
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < MIN_ROUNDS or time.perf_counter() - begin < seconds:
        _wait(cuda)
        start = time.perf_counter()
        step()
        _wait(cuda)
        times.append(time.perf_counter() - start)
    lower, middle, upper = quantiles(times, n=4)
    return Speed(
        what=what,
        images_per_second=batch / middle,
        median_ms=1e3 * middle,
        iqr_ms=1e3 * (upper - lower),
        rounds=len(times),
        peak_mib=torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
    )


def _wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()
