"""Wider-ResNet-38 in its form A2, dilated ("Wider or Deeper"; Squeeze Reasoning, Table VI).

Letters: B batch, H W image, h w map.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ctxops.init import kaiming_normal_
from segtrain.config.sr_backbones import WideResNetConfig
from segtrain.models.maps import MapInfo


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """One stage: widths as multiples of the first convolution's."""

    blocks: int
    widths: tuple[int, ...]
    pool: bool = False
    stride: int = 1
    dilation: int = 1


_STAGES = {
    "mod2": _Stage(blocks=3, widths=(2, 2), pool=True),
    "mod3": _Stage(blocks=3, widths=(4, 4), pool=True),
    "mod4": _Stage(blocks=6, widths=(8, 8), stride=2),
    "mod5": _Stage(blocks=3, widths=(8, 16), dilation=2),
    "mod6": _Stage(blocks=1, widths=(8, 16, 32), dilation=4),
    "mod7": _Stage(blocks=1, widths=(16, 32, 64), dilation=4),
}


class IdentityBlock(nn.Module):
    """Norm and ReLU in front of every convolution; nothing behind the sum.

    Two widths are two 3x3 convolutions, three are 1x1, 3x3, 1x1.

    Args:
        in_channels: Channels of the input.
        widths: Of the convolutions.
        stride: Of the first convolution, and of the shortcut.
        dilation: Of the 3x3 convolutions.
        dropout: In front of the last convolution.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        widths: Sequence[int],
        stride: int = 1,
        dilation: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.bn1 = _norm_act(in_channels)
        sizes = (3, 3) if len(widths) == 2 else (1, 3, 1)
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        before = in_channels
        for number, (size, width) in enumerate(zip(sizes, widths, strict=True), start=1):
            if number > 1:
                parts[f"bn{number}"] = _norm_act(before)
            if dropout and number == len(widths):
                parts["dropout"] = nn.Dropout(dropout)
            step = stride if number == 1 else 1
            parts[f"conv{number}"] = _conv(before, width, size, stride=step, dilation=dilation)
            before = width
        self.convs = nn.Sequential(parts)
        self.proj_conv: nn.Module | None = None
        if stride != 1 or in_channels != before:
            self.proj_conv = _conv(in_channels, before, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Transform.

        Args:
            x: Map [B, in_channels, h, w].

        Returns:
            Map of the last width, sizes divided by the stride and rounded up.
        """
        active = self.bn1(x)
        shortcut = x if self.proj_conv is None else self.proj_conv(active)
        return shortcut + self.convs(active)


class WideResNet(nn.Module):
    """First convolution, six stages, and a last norm with ReLU.

    Args:
        stages: Name -> stage.
        width: Of the first convolution.
        maps: What the stages give.
    """

    normalisation = "imagenet"

    def __init__(
        self, *, stages: dict[str, nn.Module], width: int, maps: dict[str, MapInfo]
    ) -> None:
        super().__init__()
        self.maps = maps
        self.mod1 = nn.Sequential(OrderedDict(conv1=_conv(3, width, 3)))
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        for name, stage in stages.items():
            self.add_module(name, stage)
        self.bn_out = _norm_act(list(maps.values())[-1].channels)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Compute the maps.

        Args:
            image: [B, 3, H, W].

        Returns:
            mod2 to mod7, sizes rounded up; the last one behind norm and ReLU.
        """
        features, x = {}, self.mod1(image)
        for name in self.maps:
            if _STAGES[name].pool:
                x = self.pool(x)
            features[name] = x = self.get_submodule(name)(x)
        return features | {name: self.bn_out(x)}


def build_wide_resnet(config: WideResNetConfig, *, image_size: tuple[int, int]) -> WideResNet:
    """Build Wider-ResNet-38 with random weights.

    Args:
        config: The section.
        image_size: Not used, all sizes fit.

    Returns:
        The backbone.
    """
    dropouts = {"mod6": config.dropout, "mod7": config.last_dropout}
    channels, stride = config.width, 1
    stages: dict[str, nn.Module] = {}
    maps = {}
    for name, stage in _STAGES.items():
        widths = [config.width * multiple for multiple in stage.widths]
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        for number in range(1, stage.blocks + 1):
            blocks[f"block{number}"] = IdentityBlock(
                in_channels=channels,
                widths=widths,
                stride=stage.stride if number == 1 else 1,
                dilation=stage.dilation,
                dropout=dropouts.get(name, 0.0),
            )
            channels = widths[-1]
        stages[name] = nn.Sequential(blocks)
        stride *= stage.stride * (2 if stage.pool else 1)
        maps[name] = MapInfo(channels=channels, stride=stride)
    return WideResNet(stages=stages, width=config.width, maps=maps)


def _norm_act(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())


def _conv(
    in_channels: int, out_channels: int, size: int, *, stride: int = 1, dilation: int = 1
) -> nn.Conv2d:
    reach = dilation * (size // 2)
    conv = nn.Conv2d(
        in_channels,
        out_channels,
        size,
        stride=stride,
        padding=reach,
        dilation=dilation if size > 1 else 1,
        bias=False,
    )
    return kaiming_normal_(conv)
