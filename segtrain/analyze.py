"""Parameters, multiply-accumulates and training memory of a model, part by part, from shapes alone.

1 MAC is one multiply-add of a matrix product or a convolution, attention included; norms,
activations and resizing are not counted. Memory is what the backward pass keeps, with PyTorch's
fused attention. No number is computed: a model of any size is analysed in a second.

Letters: B batch, H W image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from segtrain.config.schema import RunConfig
from segtrain.errors import UserError
from segtrain.models import build_model

# Classes of the data sets; those of a folder are known only where it lies.
NUM_CLASSES = {
    "ade20k": 150,
    "camvid": 11,
    "cityscapes": 19,
    "context59": 59,
    "context60": 60,
    "lip": 20,
    "voc": 21,
}
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Tensors as large as the parameters: weights, gradients, and what the optimizer keeps.
_COPIES = {"sgd": 3, "adamw": 4}
_BYTES = 4
_WHOLE = "(output)"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a part costs for one batch.

    Attributes:
        parameters: Scalars.
        macs: Of a forward pass.
        kept: Bytes that the backward pass keeps.
    """

    parameters: int = 0
    macs: int = 0
    kept: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            parameters=self.parameters + other.parameters,
            macs=self.macs + other.macs,
            kept=self.kept + other.kept,
        )


def num_classes_of(config: RunConfig, given: int | None = None) -> int:
    """Number of classes without looking at the data.

    Args:
        config: The run.
        given: By the user; None takes that of the data set.

    Returns:
        K.

    Raises:
        UserError: If only the data know it, or `given` is no count.
    """
    if given is not None and given < 1:
        raise UserError(f"--classes must be at least 1, got {given}")
    names = config.data.folder.classes if config.data.folder else None
    listed = len(names) if isinstance(names, tuple) else None
    known = given or NUM_CLASSES.get(config.data.dataset) or listed
    if known is None:
        raise UserError("the number of classes stands with the data only; add --classes N")
    return known


def analyze(
    config: RunConfig, *, num_classes: int, size: tuple[int, int], batch: int = 1
) -> dict[str, Cost]:
    """Cost of every part of the model that a configuration describes.

    Args:
        config: The run; its `train.precision` is that of the activations.
        num_classes: K.
        size: (H, W) of the images.
        batch: B.

    Returns:
        Part -> cost, in the order of execution, then "total".

    Raises:
        UserError: If the configuration contradicts itself.
    """
    with torch.device("meta"):
        model = build_model(config.model, num_classes, image_size=config.data.crop).train()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.eval()  # costs the same, and one image is enough for it
    # Fake tensors of the CPU, where meta tensors have no fused attention.
    with FakeTensorMode():
        _faked(model)
        image = torch.empty(batch, 3, *size)
        tally = _Tally(model)
        tally.run(lambda: model(image), _TYPES[config.train.precision])
        return tally.costs()


def optimizer_bytes(config: RunConfig, parameters: int) -> int:
    """Memory of weights, gradients and the state of the optimizer.

    Args:
        config: The run.
        parameters: Scalars of the model.

    Returns:
        Bytes; a running average of the weights (`train.ema_decay`) counts too.
    """
    copies = _COPIES[config.optim.name] + (config.train.ema_decay > 0)
    return copies * _BYTES * parameters


def table(costs: dict[str, Cost], config: RunConfig) -> str:
    """The costs as text.

    Args:
        costs: From `analyze`.
        config: The run.

    Returns:
        A line per part, the total, and the memory of weights and optimizer.
    """
    width = max(len(name) for name in costs)
    lines = [f"{'part':{width}}  {'parameters':>13}  {'GMACs':>9}  {'kept, MiB':>10}"]
    for name, cost in costs.items():
        lines.append(
            f"{name:{width}}  {cost.parameters:13,}  {cost.macs / 1e9:9.3f}  "
            f"{cost.kept / 2**20:10.1f}"
        )
    fixed = optimizer_bytes(config, costs["total"].parameters)
    lines.append(
        f"weights, gradients and {config.optim.name}: {fixed / 2**20:,.0f} MiB; with what the "
        f"backward pass keeps ({config.train.precision}): "
        f"{(fixed + costs['total'].kept) / 2**20:,.0f} MiB"
    )
    return "\n".join(lines)


def _faked(model: nn.Module) -> None:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(tuple(parameter.shape))))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(tuple(buffer.shape), dtype=buffer.dtype))


class _Tally:
    """Books MACs and kept bytes on the part that runs; parts are names of one or two words."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.macs: dict[str, int] = {}
        self.kept: dict[str, int] = {}
        self._running = [_WHOLE]
        self._counted = 0
        self._flops = FlopCounterMode(display=False)
        # Kept alive, so that no two storages get the same address.
        self._storages: dict[int, Any] = {
            p.untyped_storage()._cdata: p.untyped_storage() for p in model.parameters()
        }

    def run(self, forward: Callable[[], object], dtype: torch.dtype) -> None:
        """Run once and book."""
        hooks = []
        for name, module in self.model.named_modules():
            if name:
                hooks.append(module.register_forward_pre_hook(self._entering(_part(name))))
                hooks.append(module.register_forward_hook(self._leaving))
        low = dtype != torch.float32
        with self._flops, torch.autograd.graph.saved_tensors_hooks(self._keep, lambda x: x):
            with torch.autocast("cpu", dtype=dtype if low else torch.bfloat16, enabled=low):
                forward()
        self._book()
        for hook in hooks:
            hook.remove()

    def costs(self) -> dict[str, Cost]:
        """Part -> cost in the order of execution, then the total."""
        parameters: dict[str, int] = {}
        for name, parameter in self.model.named_parameters():
            part = _part(name.rpartition(".")[0])
            parameters[part] = parameters.get(part, 0) + parameter.numel()
        order = dict.fromkeys([*parameters, *self.macs, *self.kept])
        costs = {
            part: Cost(
                parameters=parameters.get(part, 0),
                macs=self.macs.get(part, 0),
                kept=self.kept.get(part, 0),
            )
            for part in order
        }
        costs = {part: cost for part, cost in costs.items() if cost != Cost()}
        return costs | {"total": sum(costs.values(), Cost())}

    def _entering(self, part: str) -> Callable[..., None]:
        def enter(*_: object) -> None:
            self._book()
            self._running.append(part)

        return enter

    def _leaving(self, *_: object) -> None:
        self._book()
        self._running.pop()

    def _book(self) -> None:
        """MACs since the last time belong to the part that runs."""
        total = self._flops.get_total_flops() // 2
        part = self._running[-1]
        self.macs[part] = self.macs.get(part, 0) + total - self._counted
        self._counted = total

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = storage
            part = self._running[-1]
            self.kept[part] = self.kept.get(part, 0) + storage.nbytes()
        return tensor


def _part(name: str) -> str:
    """`encoder.blocks.3.attn` -> `encoder.blocks`."""
    return ".".join(name.split(".")[:2])
