"""Weights, gradients and optimizer spread over the processes (FSDP2), for models that need it.

Every transformer layer is gathered while it works, forward and backward; the rest of the model is
one more piece. What is saved is whole and has the names and the order of an unsharded run, so that
a run may go on with another number of processes, sharded or not.
"""

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ctxops.tokens import TransformerBlock
from segtrain import dist
from segtrain.errors import UserError

if TYPE_CHECKING:
    from segtrain.config.schema import TrainConfig

# Weights travel in bfloat16, gradients are summed in float32.
_HALF = MixedPrecisionPolicy(
    param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
)
_WHOLE = StateDictOptions(full_state_dict=True)
_WHOLE_ON_MAIN = StateDictOptions(full_state_dict=True, cpu_offload=True)


def check_sharding() -> None:
    """Refuse to shard where there is nobody to share with.

    Raises:
        UserError: If this is the only process.
    """
    if dist.world_size() < 2:
        raise UserError(
            "train.parallel fsdp needs several processes, this is the only one; start them with "
            "torchrun --nproc-per-node N -m segtrain, or write train.parallel: ddp"
        )


class Sharding:
    """A model whose parameters this turns into shards, in place; build its optimizer afterwards.

    Args:
        model: On its device, with the same weights in all processes.
        options: The section `train`.
        device: Of the model.
    """

    def __init__(self, model: nn.Module, options: "TrainConfig", device: torch.device) -> None:
        self._model, self._device = model, device
        self._outline = _without_weights(model)
        mesh = init_device_mesh(device.type, (dist.world_size(),))
        for layer in model.modules():
            if isinstance(layer, TransformerBlock):
                if options.precision == "bf16":
                    # Autocast would turn the weights of their linear maps into it anyway, but
                    # not those of norms, which are left to the layer.
                    fully_shard(layer.attn, mesh=mesh, mp_policy=_HALF)
                    fully_shard(layer.mlp, mesh=mesh, mp_policy=_HALF)
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def whole_model(self) -> nn.Module:
        """A copy that is not sharded, as every process may call it as often as it likes.

        A call of all processes.

        Returns:
            A module on the device of the model, without gradients.
        """
        whole = deepcopy(self._outline)
        whole.load_state_dict(get_model_state_dict(self._model, options=_WHOLE), assign=True)
        return whole.to(self._device).requires_grad_(False)

    def state_dicts(self, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], ...]:
        """Take the states of model and optimizer; a call of all processes.

        Args:
            optimizer: Of the model.

        Returns:
            Both as if nothing were sharded, on the CPU of the main process; elsewhere empty.
        """
        weights = get_model_state_dict(self._model, options=_WHOLE_ON_MAIN)
        by_name = get_optimizer_state_dict(self._model, optimizer, options=_WHOLE_ON_MAIN)
        return (weights, _numbered(by_name)) if dist.is_main() else ({}, {})

    def load_state_dicts(
        self, optimizer: torch.optim.Optimizer, weights: dict[str, Any], state: dict[str, Any]
    ) -> None:
        """Restore model and optimizer; a call of all processes.

        Args:
            optimizer: Of the model.
            weights: State of an unsharded model.
            state: State of an unsharded optimizer.
        """
        set_model_state_dict(self._model, weights, options=_WHOLE)
        by_name = _named(state, self._names(optimizer))
        set_optimizer_state_dict(self._model, optimizer, by_name, options=_WHOLE)

    def _names(self, optimizer: torch.optim.Optimizer) -> list[str]:
        """Names of the optimizer's parameters, in its order."""
        names = {parameter: name for name, parameter in self._model.named_parameters()}
        return [names[p] for group in optimizer.param_groups for p in group["params"]]


def _numbered(state: dict[str, Any]) -> dict[str, Any]:
    """State of an optimizer by name -> by number, as optimizers have it themselves."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    number = {name: k for k, name in enumerate(names)}
    groups = [{**g, "params": [number[n] for n in g["params"]]} for g in state["param_groups"]]
    return {
        "state": {number[name]: state["state"][name] for name in names if name in state["state"]},
        "param_groups": groups,
    }


def _named(state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The other way round."""
    groups = [{**g, "params": [names[k] for k in g["params"]]} for g in state["param_groups"]]
    return {"state": {names[k]: v for k, v in state["state"].items()}, "param_groups": groups}


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy with everything but the numbers of the parameters."""
    outline = deepcopy(model)
    for module in outline.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
    return outline.eval()
