"""ResNets of timm as backbones, with dilated stages; parameters keep timm's names."""

from collections.abc import Sequence

from torch import Tensor, nn

from ctxops.heads.squeeze_excitation import SqueezeExcitation
from ctxops.sr import SqueezeReasoningGate
from segtrain.config.backbones import ResNetConfig
from segtrain.models.maps import MapInfo

LAYERS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
# Our name -> timm's stem type and width; the last convolution of a deep stem is twice as wide.
_STEMS = {"plain": ("", 64), "deep32": ("deep", 32), "deep64": ("deep", 64)}
_STAGES = ("layer1", "layer2", "layer3", "layer4")


class ResNetBackbone(nn.Module):
    """Stem and four stages of a timm ResNet.

    Args:
        net: A `timm.models.resnet.ResNet`; its classifier is not used.
        maps: c2 to c5.
    """

    normalisation = "imagenet"

    def __init__(self, net: nn.Module, *, maps: dict[str, MapInfo]) -> None:
        super().__init__()
        self.maps = maps
        for name in ("conv1", "bn1", "act1", "maxpool", *_STAGES):
            self.add_module(name, getattr(net, name))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Compute the maps.

        Args:
            image: [B, 3, H, W].

        Returns:
            c2 to c5, sizes rounded up.
        """
        x = self.maxpool(self.act1(self.bn1(self.conv1(image))))
        features = {}
        for name, stage in zip(self.maps, _STAGES, strict=True):
            features[name] = x = self.get_submodule(stage)(x)
        return features


def build_resnet(config: ResNetConfig, *, image_size: tuple[int, int]) -> ResNetBackbone:
    """Build a ResNet with random weights.

    Args:
        config: The section.
        image_size: Not used, all sizes fit.

    Returns:
        The backbone.
    """
    from timm.models.resnet import BasicBlock, Bottleneck, ResNet

    block = BasicBlock if config.depth < 50 else Bottleneck
    stem_type, stem_width = _STEMS[config.stem]
    net = ResNet(
        block,
        LAYERS[config.depth],
        num_classes=0,
        output_stride=config.output_stride,
        stem_type=stem_type,
        stem_width=stem_width,
        channels=config.widths,
    )
    strides = [min(stride, config.output_stride) for stride in (4, 8, 16, 32)]
    add_gates(net, config.gate)
    _set_dilations(net, config, strides)
    maps = {
        f"c{index + 2}": MapInfo(channels=width * block.expansion, stride=stride)
        for index, (width, stride) in enumerate(zip(config.widths, strides, strict=True))
    }
    return ResNetBackbone(net, maps=maps)


def add_gates(net: nn.Module, gate: str) -> None:
    """Put a gate on the last norm of every block, before the shortcut is added.

    Args:
        net: A `timm.models.resnet.ResNet`.
        gate: "se", "sr" (Squeeze Reasoning, Table X), or "none".
    """
    if gate == "none":
        return
    for stage in _STAGES:
        for block in net.get_submodule(stage):
            last = block.bn3 if hasattr(block, "bn3") else block.bn2
            channels = last.num_features
            block.se = (
                SqueezeReasoningGate(in_channels=channels)
                if gate == "sr"
                else SqueezeExcitation(in_channels=channels)
            )


def _set_dilations(net: nn.Module, config: ResNetConfig, strides: Sequence[int]) -> None:
    """All blocks of a stage dilate alike; timm's first block keeps the dilation before."""
    for stage, plain, stride in zip(_STAGES, (4, 8, 16, 32), strides, strict=True):
        dilation = plain // stride
        if dilation == 1:
            continue
        last = stage == _STAGES[-1]
        for index, block in enumerate(net.get_submodule(stage)):
            if config.multi_grid and last:
                _dilate(block, dilation * 2 ** min(index, 2))
            elif not (config.contract_dilation and index == 0):
                _dilate(block, dilation)


def _dilate(block: nn.Module, dilation: int) -> None:
    for module in block.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.dilation = module.padding = (dilation, dilation)
