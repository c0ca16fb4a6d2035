"""Whether hand-written passes may stand in for layers that they use the weights of."""

from torch import Tensor, nn

from ctxops.products import is_plain_float32

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def are_plain(x: Tensor, *layers: nn.Module) -> bool:
    """Whether only the weights of these layers matter, on a tensor of the kind that passes take.

    Args:
        x: Input of the layers.
        *layers: Convolutions, which may have been exchanged for something else.

    Returns:
        False for layers that are no `nn.Conv2d` with a bias (a subclass may do more), for layers
        with hooks, and where `is_plain_float32` says so.
    """
    if not is_plain_float32(x):  # first: compilers need not follow the rest
        return False
    for layer in layers:
        if type(layer) is not nn.Conv2d or layer.bias is None or has_hooks(layer):
            return False
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    return is_plain_float32(*parameters)


def has_hooks(*modules: nn.Module) -> bool:
    """Whether anybody listens to the calls of these modules.

    Args:
        *modules: Modules of any kind.

    Returns:
        True if one of them has a hook for its forward or backward pass.
    """
    return any(getattr(module, name) for module in modules for name in _HOOKS)
