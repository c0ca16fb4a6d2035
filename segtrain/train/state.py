"""Everything that training changes, in one object that can be saved and restored."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from segtrain import dist
from segtrain.errors import UserError
from segtrain.optim import build_optimizer
from segtrain.train.ema import build_average
from segtrain.train.rng import generator_state, set_generator_state
from segtrain.train.sharding import Sharding, check_sharding
from segtrain.wording import plural

if TYPE_CHECKING:
    from segtrain.config.schema import RunConfig, TrainConfig

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class TrainingState:
    """A model in training.

    Args:
        model: The plain module, whose names and weights are saved.
        forward: The same as it is called: compiled, and averaging gradients over processes.
        optimizer: Over the parameters of `model`.
        scaler: Of the loss; does nothing but with fp16.
        average: Running average of the weights, or None.
        sharding: What knows the whole of a model in shards; None where every process has it.
        step: Updates done.
        rewinds: How often the run went back because of numbers that were not finite.
    """

    model: nn.Module
    forward: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: AveragedModel | None = None
    sharding: Sharding | None = None
    step: int = 0
    rewinds: int = 0

    def evaluated_model(self) -> nn.Module:
        """What is evaluated and exported; a call of all processes.

        Returns:
            The average, where one is kept; a whole copy, where the model is in shards. The same
            everywhere, also where statistics of norms are those of a process: of the main one.
        """
        if self.sharding is not None:
            model = self.sharding.whole_model()
        else:
            model = self.model if self.average is None else self.average.module
        dist.share_buffers(model)
        return model

    def gradients_stay_here(self, here: bool) -> AbstractContextManager[Any]:
        """Context of a forward and backward pass.

        Args:
            here: Whether to leave the gradients in this process, because more are to come.

        Returns:
            The context.
        """
        if here and isinstance(self.forward, DistributedDataParallel):
            return self.forward.no_sync()
        return nullcontext()

    def after_update(self) -> None:
        """Let the model move what no gradient moves; take the weights into the average."""
        if hasattr(self.model, "after_update"):
            self.model.after_update()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def weights(self) -> dict[str, Any]:
        """Weights and statistics of the model in training; a call of all processes.

        Returns:
            Whole, by name; empty on processes other than the main one, where the model is sharded.
        """
        if self.sharding is None:
            return self.model.state_dict()
        return self.sharding.state_dicts(self.optimizer)[0]

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types; a call of all processes, of which each has its generators.

        Returns:
            What `load_state_dict` takes.
        """
        if self.sharding is None:
            model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        else:
            model, optimizer = self.sharding.state_dicts(self.optimizer)
        return {
            "step": self.step,
            "rewinds": self.rewinds,
            "model": model,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "generators": dist.gather_objects(generator_state()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore everything but the random generators, which `restore_generators` does.

        Args:
            state: Of `state_dict`.
        """
        self.step = state["step"]
        self.rewinds = state.get("rewinds", 0)  # unknown to older checkpoints
        if self.sharding is None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            self.sharding.load_state_dicts(self.optimizer, state["model"], state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def restore_generators(state: dict[str, Any]) -> bool:
    """Put the random generators of this process back.

    Args:
        state: Of `TrainingState.state_dict`.

    Returns:
        False where the run had another number of processes, and nothing is restored.
    """
    generators = state["generators"]
    if len(generators) != dist.world_size():
        return False
    set_generator_state(generators[dist.rank()])
    return True


def build_state(model: nn.Module, config: "RunConfig", device: torch.device) -> TrainingState:
    """Put a model on its device and build what trains it.

    Args:
        model: With its initial weights, the same in all processes.
        config: Of the run.
        device: Where to train.

    Returns:
        The state before the first update.

    Raises:
        UserError: If the precision does not exist on the device, or nothing can be sharded.
    """
    options = config.train
    if options.precision == "fp16" and device.type != "cuda":
        raise UserError(
            f"train.precision fp16 needs a GPU, this process has {device.type}; "
            "write train.precision: bf16"
        )
    if _wants_synced_norms(options, device):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    model = model.to(device, memory_format=layout).train()
    average = build_average(model, options.ema_decay)
    sharding = None
    forward: nn.Module = torch.compile(model) if options.compile else model
    if options.parallel == "fsdp":
        check_sharding()
        sharding = Sharding(model, options, device)
    elif dist.world_size() > 1:
        devices = [device] if device.type == "cuda" else None
        forward = DistributedDataParallel(forward, device_ids=devices)
        forward.register_forward_hook(lambda *_: dist.meets())  # to average the gradients
    return TrainingState(
        model=model,
        forward=forward,
        optimizer=build_optimizer(model, config.optim),
        scaler=torch.amp.GradScaler(device.type, enabled=options.precision == "fp16"),
        average=average,
        sharding=sharding,
    )


def precision(options: "TrainConfig", device: torch.device) -> AbstractContextManager[Any]:
    """Context of a forward pass in the precision of the run.

    Args:
        options: The section `train`.
        device: Where the pass runs.

    Returns:
        Autocast, or nothing for fp32.
    """
    if options.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=_HALF[options.precision])


def batch_norm_notice(model: nn.Module, config: "RunConfig", device: torch.device) -> str | None:
    """What a user should know about batch norms, whose statistics are of one forward pass.

    Args:
        model: What is trained.
        config: Of the run.
        device: Where.

    Returns:
        A line, or None where the model has none or they see the global batch.
    """
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        return None
    synced = _wants_synced_norms(config.train, device)
    images = micro_batch(config.train) * (dist.world_size() if synced else 1)
    refused = config.train.sync_bn is True and dist.world_size() > 1 and not synced
    if images == config.train.global_batch:
        return None
    return (
        f"batch norms see {images} of the {config.train.global_batch} images of an update: "
        "other numbers of processes or train.micro_batch give other results"
        + ("; train.sync_bn: true needs a GPU for each process" if refused else "")
    )


def micro_batch(options: "TrainConfig") -> int:
    """Images of one forward pass in one process.

    Args:
        options: The section `train`.

    Returns:
        `micro_batch`, or the share of this process in the global batch.

    Raises:
        UserError: If the global batch cannot be split evenly.
    """
    processes = dist.world_size()
    size = options.micro_batch or max(1, options.global_batch // processes)
    if options.global_batch % (size * processes):
        even = max(1, round(options.global_batch / (size * processes))) * size * processes
        raise UserError(
            f"train.global_batch {options.global_batch} is no multiple of {plural(size, 'image')} "
            f"in each of {plural(processes, 'process')}; write train.global_batch: {even}"
            + (" or another train.micro_batch" if options.micro_batch else "")
        )
    return size


def _wants_synced_norms(options: "TrainConfig", device: torch.device) -> bool:
    """Torch has synchronised batch norms for GPUs only."""
    wanted = options.sync_bn in ("auto", True)
    return wanted and dist.world_size() > 1 and device.type == "cuda"
