"""Initial weights, in place, and layers that come with Xavier-uniform weights and zero biases.

Deviation: the A²-FPN paper is silent about initialisation; it gets the Xavier-uniform layers.
"""

from typing import TypeVar

from torch import nn

LayerT = TypeVar("LayerT", nn.Conv1d, nn.Conv2d, nn.Linear)


def conv2d(in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1) -> nn.Conv2d:
    """Convolution with a bias that keeps the size (stride 1) or divides it, rounding up.

    Args:
        in_channels: Channels of the input map.
        out_channels: Channels of the output map.
        kernel_size: Odd window size; the padding is half of it.
        stride: Distance of the windows.

    Returns:
        A module [B, in_channels, H, W] -> [B, out_channels, ceil(H / stride), ceil(W / stride)].
    """
    padding = kernel_size // 2
    return xavier_(nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding))


def conv1d(in_channels: int, out_channels: int) -> nn.Conv1d:
    """1x1 convolution over a set of vectors, with a bias.

    Args:
        in_channels: Width of the input vectors.
        out_channels: Width of the output vectors.

    Returns:
        A module [B, in_channels, N] -> [B, out_channels, N].
    """
    return xavier_(nn.Conv1d(in_channels, out_channels, 1))


def linear(in_features: int, out_features: int) -> nn.Linear:
    """Fully connected layer with a bias.

    Args:
        in_features: Width of the input vectors.
        out_features: Width of the output vectors.

    Returns:
        A module [..., in_features] -> [..., out_features].
    """
    return xavier_(nn.Linear(in_features, out_features))


def xavier_(layer: LayerT) -> LayerT:
    """Xavier-uniform weight, zero bias, in place.

    Args:
        layer: A convolution or fully connected layer, with or without a bias.

    Returns:
        The same layer.
    """
    nn.init.xavier_uniform_(layer.weight)
    return _zero_bias(layer)


def fan_in_uniform_(layer: LayerT) -> LayerT:
    """Uniform weight of variance 1 / fan-in (Kaiming-uniform with slope 1), zero bias, in place.

    Args:
        layer: A convolution or fully connected layer, with or without a bias.

    Returns:
        The same layer.
    """
    nn.init.kaiming_uniform_(layer.weight, a=1)
    return _zero_bias(layer)


def kaiming_normal_(layer: LayerT) -> LayerT:
    """Normal weight of variance 2 / fan-in, zero bias, in place.

    Args:
        layer: A convolution or fully connected layer, with or without a bias.

    Returns:
        The same layer.
    """
    nn.init.kaiming_normal_(layer.weight)
    return _zero_bias(layer)


def trunc_normal_(layer: LayerT, *, std: float = 0.02) -> LayerT:
    """Normal weight cut at +-2, zero bias, in place.

    Args:
        layer: A convolution or fully connected layer, with or without a bias.
        std: Standard deviation.

    Returns:
        The same layer.
    """
    nn.init.trunc_normal_(layer.weight, std=std)
    return _zero_bias(layer)


def _zero_bias(layer: LayerT) -> LayerT:
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
