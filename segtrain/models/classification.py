"""Classifiers of Squeeze Reasoning, Table X: ResNet, SE-ResNet and SR-ResNet."""

from typing import Literal

from torch import nn

from segtrain.models.backbones.resnet import LAYERS, add_gates


def build_classifier(
    *,
    depth: Literal[50, 101] = 50,
    gate: Literal["none", "se", "sr"] = "sr",
    num_classes: int = 1000,
) -> nn.Module:
    """Build a ResNet with random weights and a gate in every block.

    Its weights fit the backbone `resnet` with `stem: plain` and the same gate.

    Args:
        depth: Number of layers.
        gate: On the last norm of a block: none, squeeze-and-excitation, or squeeze reasoning.
        num_classes: K.

    Returns:
        A timm ResNet from images [B, 3, H, W] to logits [B, K].
    """
    from timm.models.resnet import Bottleneck, ResNet

    net = ResNet(Bottleneck, LAYERS[depth], num_classes=num_classes)
    add_gates(net, gate)
    return net
