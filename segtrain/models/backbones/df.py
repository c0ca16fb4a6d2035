"""DF1 and DF2, backbones for real time (Partial Order Pruning; Squeeze Reasoning, Table V).

Letters: B batch, H W image.
"""

from torch import Tensor, nn

from ctxops.init import kaiming_normal_
from ctxops.norm import ConvNorm
from segtrain.config.sr_backbones import DFConfig
from segtrain.models.maps import MapInfo

# Per stage behind the stem: runs of (blocks, width / that of the stem, stride of the first block).
_STAGES: dict[int, tuple[tuple[tuple[int, int, int], ...], ...]] = {
    1: (((3, 1, 2),), ((3, 2, 2),), ((3, 4, 2),), ((1, 8, 1),)),
    2: (((2, 1, 2), (1, 2, 1)), ((10, 2, 2), (1, 4, 1)), ((4, 4, 2), (2, 8, 1))),
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, a 1x1 convolution where the shape changes.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Of the first convolution.
    """

    def __init__(self, *, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, out_channels, stride=stride)
        self.conv2 = _conv(out_channels, out_channels, act=False)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = _conv(
                in_channels, out_channels, kernel_size=1, stride=stride, act=False
            )
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Transform.

        Args:
            x: Map [B, in_channels, h, w].

        Returns:
            Map [B, out_channels, ceil(h / stride), ceil(w / stride)].
        """
        return self.act(self.conv2(self.conv1(x)) + self.shortcut(x))


class DFBackbone(nn.Module):
    """Stem and stages.

    Args:
        stem: From the image to 1/4.
        stages: Behind it.
        maps: What stem and stages give.
    """

    normalisation = "imagenet"

    def __init__(
        self, *, stem: nn.Module, stages: list[nn.Module], maps: dict[str, MapInfo]
    ) -> None:
        super().__init__()
        self.maps = maps
        for name, part in zip(maps, [stem, *stages], strict=True):
            self.add_module(name, part)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Compute the maps.

        Args:
            image: [B, 3, H, W].

        Returns:
            stage1 to the last, sizes rounded up.
        """
        features, x = {}, image
        for name in self.maps:
            features[name] = x = self.get_submodule(name)(x)
        return features


def build_df(config: DFConfig, *, image_size: tuple[int, int]) -> DFBackbone:
    """Build DF1 or DF2 with random weights.

    Args:
        config: The section.
        image_size: Not used, all sizes fit.

    Returns:
        The backbone.
    """
    width, stride = config.width, 4
    half = max(1, width // 2)
    stem = nn.Sequential(_conv(3, half, stride=2), _conv(half, width, stride=2))
    maps = {"stage1": MapInfo(channels=width, stride=stride)}
    stages = []
    for number, runs in enumerate(_STAGES[config.version], start=2):
        blocks = []
        for count, multiple, first_stride in runs:
            for index in range(count):
                step = first_stride if index == 0 else 1
                out = config.width * multiple
                blocks.append(BasicBlock(in_channels=width, out_channels=out, stride=step))
                width, stride = out, stride * step
        stages.append(nn.Sequential(*blocks))
        maps[f"stage{number}"] = MapInfo(channels=width, stride=stride)
    return DFBackbone(stem=stem, stages=stages, maps=maps)


def _conv(
    in_channels: int, out_channels: int, *, kernel_size: int = 3, stride: int = 1, act: bool = True
) -> ConvNorm:
    return ConvNorm(
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=kernel_size,
        stride=stride,
        act=act,
        init=kaiming_normal_,
    )
