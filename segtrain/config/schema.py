"""Configuration of a run, section by section; what is read from YAML ends up in `RunConfig`."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from segtrain.config.base import (
    Count,
    CountOrZero,
    FromList,
    NotNegative,
    Positive,
    PositiveShare,
    Rate,
    Section,
    Text,
)
from segtrain.config.base import Size as _Size
from segtrain.config.data import DataConfig, FolderConfig
from segtrain.config.model import ModelConfig, SegmenterConfig
from segtrain.config.network import NetworkConfig
from segtrain.config.unept import BoundaryLossConfig, UneptConfig
from segtrain.config.vit import SEGMENTER_VARIANTS

__all__ = [
    "SEGMENTER_VARIANTS",
    "BoundaryLossConfig",
    "DataConfig",
    "EvalConfig",
    "FolderConfig",
    "LossConfig",
    "ModelConfig",
    "NetworkConfig",
    "OptimConfig",
    "RunConfig",
    "ScheduleConfig",
    "SegmenterConfig",
    "TrainConfig",
]


class LossConfig(Section):
    """Loss of a pixel; pixels with label 255 do not count."""

    kind: Literal["ce", "ohem"] = "ce"
    """Cross-entropy of all pixels, or of the hard ones."""

    ohem_threshold: PositiveShare = 0.7
    """A pixel is hard below this probability of its true class."""

    ohem_min_kept: Count = 10000
    """Hard pixels to keep at least, of the global batch; each micro batch keeps its share."""

    aux_weight: NotNegative = 0.4
    """Weight of the auxiliary losses of models that have them."""

    boundary: BoundaryLossConfig | None = None
    """Losses of heads that predict boundaries; null for all others."""


class OptimConfig(Section):
    """Optimizer."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Which optimizer."""

    lr: Positive
    """Learning rate at the end of the warm-up, before the schedule lowers it."""

    momentum: Rate = 0.9
    """Momentum of SGD."""

    nesterov: bool = True
    """Nesterov's momentum of SGD."""

    betas: Annotated[tuple[Rate, Rate], FromList] = (0.9, 0.999)
    """Decay of both moments of AdamW."""

    weight_decay: NotNegative = 0.0
    """Weight decay."""

    norm_weight_decay: NotNegative | None = None
    """Weight decay of norms, biases, positions and tokens; null is 0."""

    backbone_lr_factor: NotNegative = 1.0
    """Learning rate of the encoder, as a multiple of `lr`."""

    clip_norm: Positive | None = None
    """Largest norm of all gradients together; null does not clip."""

    def problems(self) -> Iterator[str]:
        """What is wrong between the keys of this section, each text with its fix."""
        if self.name == "sgd" and self.nesterov and self.momentum == 0:
            yield "nesterov needs a momentum; write nesterov: false or momentum: 0.9"


class ScheduleConfig(Section):
    """Learning rate over the iterations."""

    name: Literal["poly", "cosine", "step", "constant"] = "poly"
    """Which curve."""

    power: Positive = 0.9
    """Exponent of `poly`."""

    min_lr: NotNegative = 0.0
    """Learning rate at the end of `poly` and `cosine`."""

    warmup_iters: CountOrZero = 0
    """Iterations in which the learning rate grows linearly."""

    warmup_factor: PositiveShare = 1e-6
    """Share of the learning rate that the warm-up starts with."""

    steps: Annotated[tuple[Count, ...], FromList] = ()
    """Iterations at which `step` lowers the learning rate."""

    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """What `step` multiplies the learning rate with."""

    def problems(self) -> Iterator[str]:
        """What is wrong between the keys of this section, each text with its fix."""
        if self.name == "step" and not self.steps:
            yield "step needs steps: [ITERATION, ...]; or write name: constant"
        if self.name != "step" and self.steps:
            yield f"steps has no effect on {self.name}; write name: step or steps: []"
        if list(self.steps) != sorted(set(self.steps)):
            yield f"steps must grow, got {list(self.steps)}; sort them"


class TrainConfig(Section):
    """Length, batches and precision of training, and what is written on the way."""

    iters: Count
    """Updates of the weights."""

    global_batch: Count
    """Crops of one update, over all processes and accumulation steps."""

    micro_batch: Count | None = None
    """Crops of one forward pass in one process; null takes all at once. It changes memory and
    speed, not the update."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the activations."""

    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: `ddp` keeps the whole model in each, `fsdp` spreads weights,
    gradients and optimizer over them, for models that are too large."""

    ema_decay: Rate = 0.0
    """Decay of the running average of the weights that is evaluated; 0 keeps none."""

    compile: bool = False
    """Whether to run the model through torch.compile."""

    channels_last: bool = False
    """Whether convolutions see images with the channels last."""

    sync_bn: Literal["auto"] | bool = "auto"
    """Whether batch norms average over processes; `auto` does so on several GPUs."""

    seed: CountOrZero = 0
    """Seed of weights, augmentation and order."""

    deterministic: bool = False
    """Whether to refuse operations that do not give the same bits twice."""

    on_nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    """What to do when a loss or a gradient is NaN or infinite: end the run, leave the update out,
    or go back to the newest checkpoint and on with the data in another order."""

    log_every: Count = 10
    """Iterations from one line of the journal to the next."""

    eval_every: Count | None = None
    """Iterations from one evaluation to the next; null evaluates at the end only."""

    checkpoint_every: Count = 1000
    """Iterations from one checkpoint to the next; there is always one at the end."""

    keep: Count = 1
    """How many of the newest checkpoints to keep, beside the best."""

    timeout_minutes: Annotated[float, Field(gt=0, le=55)] = 30
    """With several processes: how long none may come further until all end and the one that did
    not arrive is named."""

    tensorboard: bool = False
    """Whether to write scalars for TensorBoard as well."""

    def problems(self) -> Iterator[str]:
        """What is wrong between the keys of this section, each text with its fix."""
        if self.micro_batch and self.global_batch % self.micro_batch:
            yield (
                f"micro_batch {self.micro_batch} must divide global_batch {self.global_batch}; "
                f"write micro_batch: {_divisor_below(self.global_batch, self.micro_batch)}"
            )
        if self.parallel == "fsdp":
            # What nobody has proven to be right in shards.
            not_sharded = {
                "ema_decay": (self.ema_decay > 0, "0"),
                "compile": (self.compile, "false"),
                "channels_last": (self.channels_last, "false"),
                "precision": (self.precision == "fp16", "bf16"),
            }
            for key, (used, fix) in not_sharded.items():
                if used:
                    value = getattr(self, key)
                    said = str(value).lower() if value is True else value
                    yield f"parallel fsdp does not go with {key} {said}; write {key}: {fix}"


class EvalConfig(Section):
    """Inference and evaluation."""

    mode: Literal["slide", "whole"] = "slide"
    """Windows that overlap, or the whole image at once."""

    window: Count | None = None
    """Side of a window in pixels; null takes the shorter side of `data.crop`."""

    stride: Count | None = None
    """Pixels from one window to the next; null takes the window less 32, at least half of it."""

    pad: Literal["resize", "zero"] = "resize"
    """What is done with an image that is smaller than a window: enlarge it (Segmenter), or fill up
    right and bottom with zeros (UN-EPT)."""

    window_batch: Count = 4
    """Windows of one forward pass."""

    ratios: Annotated[tuple[Positive, ...], Field(min_length=1), FromList] = (1.0,)
    """Scales whose probabilities are averaged."""

    flip: bool = False
    """Whether to average with the mirrored image as well."""

    base_size: _Size | None = None
    """As `data.base_size`, for evaluation; null takes that one."""


class RunConfig(Section):
    """One run."""

    data: DataConfig
    model: ModelConfig
    loss: LossConfig = LossConfig()
    optim: OptimConfig
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    eval: EvalConfig = EvalConfig()

    output: Text = "output/run"
    """Folder of the run; a file named `x.yaml` that does not say takes `output/x`."""

    init: Text | None = None
    """Weights of the whole model to start from, a file; null starts as the model says."""

    def problems(self) -> Iterator[str]:
        """What is wrong between the sections, each text with its fix."""
        yield from self._schedule_problems()
        yield from self._window_problems()
        yield from self._boundary_problems()

    def _schedule_problems(self) -> Iterator[str]:
        iters, schedule = self.train.iters, self.schedule
        if schedule.warmup_iters >= iters:
            yield (
                f"schedule.warmup_iters {schedule.warmup_iters} must be below train.iters {iters}; "
                f"write schedule.warmup_iters: {iters // 10}"
            )
        if schedule.steps and schedule.steps[-1] >= iters:
            yield (
                f"schedule.steps must be below train.iters {iters}, got {schedule.steps[-1]}; "
                "lower it or raise train.iters"
            )
        if schedule.min_lr > self.optim.lr:
            yield (
                f"schedule.min_lr {schedule.min_lr:g} must not exceed optim.lr "
                f"{self.optim.lr:g}; write schedule.min_lr: 0"
            )

    def _window_problems(self) -> Iterator[str]:
        # The crop is no multiple of the patch in every recipe; what lacks is padded.
        window, stride = window_and_stride(self)
        smallest = self.model.smallest_window
        if window < smallest:
            name = "eval.window" if self.eval.window else "data.crop"
            yield f"{name} {window} must be at least {smallest}, what the model takes; raise it"
        if stride > window:
            yield (
                f"eval.stride {stride} must not exceed the window {window}, pixels between "
                f"windows would get no score; write eval.stride: {window}"
            )

    def _boundary_problems(self) -> Iterator[str]:
        head = getattr(self.model, "head", None)
        predicted = isinstance(head, UneptConfig) and head.spatial_branch
        if predicted and self.loss.boundary is None:
            yield (
                "head unept predicts boundaries, which must be learnt; write loss.boundary: {} for "
                "the paper's losses, or model.head.spatial_branch: false"
            )
        if not predicted and self.loss.boundary is not None:
            yield (
                "loss.boundary is for models that predict boundaries (model.head.name: unept with "
                "its spatial branch); write loss.boundary: null"
            )


def window_and_stride(config: RunConfig) -> tuple[int, int]:
    """The window of sliding inference and its stride, defaults filled in.

    Args:
        config: A configuration.

    Returns:
        Both in pixels.
    """
    window = config.eval.window or min(config.data.crop)
    return window, config.eval.stride or max(window - 32, (window + 1) // 2)


def _divisor_below(number: int, most: int) -> int:
    return next(d for d in range(most, 0, -1) if number % d == 0)
