"""A ResNet with context modules behind its blocks, or in the place of their 3x3 convolutions.

Letters: B batch, C channels, H W map.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence

from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import Backbone, ResNet
from torch import Tensor, nn

from ctxops.checks import check_choice
from ctxops.heads.augmented_conv import AugmentedConv

# Which blocks of a stage: every one, the last one, or the one in front of the last block.
BLOCKS = ("all", "last", "before_last")
# "Attention Augmented Convolutional Networks", 4.3: shares of the output channels, heads, and the
# least width of a head's queries.
KEY_SHARE, VALUE_SHARE, HEADS, LEAST_KEY = 0.2, 0.1, 8, 20


class ContextResNet(Backbone):
    """A ResNet whose blocks hand their output, after the last ReLU, to context modules.

    The ResNet's tensors keep their names, so that weights of a plain one fit. The modules come
    after the ResNet was built and frozen: they are trained even where their stage is not, and their
    norms are never turned into frozen ones.

    Args:
        resnet: Detectron2's ResNet; its parts are taken over.
        contexts: Modules C -> C of one size by stage and block, as `res5_0`.

    Raises:
        ValueError: If a key stands for no block.
    """

    def __init__(self, *, resnet: ResNet, contexts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        names = [name for stage in resnet.stage_names for name in block_names(resnet, stage)]
        for key in contexts:
            check_choice(key, "keys of contexts", names)
        self.stem = resnet.stem
        self.stage_names = tuple(resnet.stage_names)
        for name in self.stage_names:
            self.add_module(name, getattr(resnet, name))
        self.context = nn.ModuleDict(contexts)
        self._shapes = resnet.output_shape()

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every output map by name."""
        return dict(self._shapes)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Compute the maps.

        Args:
            image: [B, 3, H, W], normalised.

        Returns:
            Map name -> [B, C, H / stride, W / stride].
        """
        x = self.stem(image)
        outputs = {"stem": x} if "stem" in self._shapes else {}
        for stage in self.stage_names:
            for index, block in enumerate(getattr(self, stage)):
                x = block(x)
                name = f"{stage}_{index}"
                if name in self.context:
                    x = self.context[name](x)
            if stage in self._shapes:
                outputs[stage] = x
        return outputs


def block_names(resnet: ResNet, stage: str, *, blocks: str = "all") -> list[str]:
    """Names of blocks of a stage.

    Args:
        resnet: Where the stage is looked up.
        stage: As `res5`.
        blocks: `all`, `last` or `before_last` (the only one of a stage is both).

    Returns:
        As `res5_0`.

    Raises:
        ValueError: If the stage is absent or `blocks` unknown.
    """
    check_choice(stage, "stage", resnet.stage_names)
    check_choice(blocks, "blocks", BLOCKS)
    names = [f"{stage}_{index}" for index in range(len(getattr(resnet, stage)))]
    if blocks == "last":
        return names[-1:]
    return names if blocks == "all" else names[-2:][:1]


def make_contexts(
    resnet: ResNet, make: Callable[[int], nn.Module], *, stages: Sequence[str], blocks: str
) -> dict[str, nn.Module]:
    """One module for each of the chosen blocks, for `ContextResNet`.

    Args:
        resnet: Where they will stand.
        make: From C to a module.
        stages: As `["res4", "res5"]`.
        blocks: As in `block_names`.

    Returns:
        Block name -> module.

    Raises:
        ValueError: If a stage is absent, `blocks` unknown, or no module can be made.
    """
    return {
        name: make(block.out_channels)
        for stage in stages
        for name, block in _chosen(resnet, stage, blocks)
    }


def augment_convolutions(resnet: ResNet, *, stages: Sequence[str], blocks: str) -> ResNet:
    """Give blocks an attention augmented 3x3 convolution in the place of their own, in place.

    The norm behind it stays. Weights of a plain ResNet fit everything but these convolutions.

    Args:
        resnet: The ResNet to change.
        stages: As `["res4", "res5"]`.
        blocks: As in `block_names`.

    Returns:
        `resnet`.

    Raises:
        ValueError: If a stage is absent, `blocks` unknown, or a convolution is grouped or
            deformable.
    """
    for stage in stages:
        for name, block in _chosen(resnet, stage, blocks):
            conv = block.conv2
            if not isinstance(conv, Conv2d) or conv.groups != 1:
                raise ValueError(
                    f"{name}: attention augments plain 3x3 convolutions, not grouped or deformable "
                    "ones; use a ResNet, or leave the stage out"
                )
            parts = {"augmented": _augmented(conv), "norm": conv.norm}
            block.conv2 = nn.Sequential(OrderedDict(parts))
    return resnet


def _chosen(resnet: ResNet, stage: str, blocks: str) -> Iterator[tuple[str, nn.Module]]:
    for name in block_names(resnet, stage, blocks=blocks):
        yield name, getattr(resnet, stage)[int(name.rpartition("_")[2])]


def _augmented(conv: Conv2d) -> AugmentedConv:
    def share(part: float, least: int) -> int:
        return HEADS * max(least, round(part * conv.out_channels / HEADS))

    return AugmentedConv(
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        key_channels=share(KEY_SHARE, LEAST_KEY),
        value_channels=share(VALUE_SHARE, 1),
        num_heads=HEADS,
        kernel_size=conv.kernel_size[0],
        stride=conv.stride[0],
        dilation=conv.dilation[0],
    )
