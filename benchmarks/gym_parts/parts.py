"""What all networks of the gym are built from: stems, the shape of a network, fillers.

A network is a stem (the same in a method and its twin, first drawn, so of equal weights for equal
seeds), a body, which is what the two differ in, and a classifier. Norms are batch norms: a group
norm averages over the map, which would be context in the twin.

Letters: B batch, C channels, H W image, h w map, K classes.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gym_parts.images import Batch
from ctxops.losses import cross_entropy, keep_labels
from ctxops.norm import ConvNorm
from ctxops.resize import resize_bilinear

WIDTH = 32


def count_parameters(module: nn.Module) -> int:
    """Number of weights."""
    return sum(p.numel() for p in module.parameters())


class Residual(nn.Module):
    """x + BN(conv(ReLU(BN(conv(x))))), as wide inside as it takes to have so many weights.

    With a window of 1 it sees one position; it is what a twin has for its context.

    Args:
        channels: C.
        parameters: The number of weights that is wanted.
        window: Side of the first convolution's window; the second has 1.
    """

    def __init__(self, *, channels: int, parameters: int, window: int = 1) -> None:
        super().__init__()
        per_hidden = channels * (window**2 + 1) + 2
        hidden = max(1, round((parameters - 2 * channels) / per_hidden))
        self.first = ConvNorm(in_channels=channels, out_channels=hidden, kernel_size=window)
        self.second = ConvNorm(in_channels=hidden, out_channels=channels, kernel_size=1, act=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> the same."""
        return x + self.second(self.first(x))


class Stem(nn.Module):
    """Image to maps of falling size; every map comes from the one before.

    Args:
        strides: Of the maps, powers of two, rising; the first map is reached in steps of 2.
        width: C of all maps.
    """

    def __init__(self, strides: Sequence[int], *, width: int = WIDTH) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.steps = nn.ModuleList()
        channels = 3
        for _ in range(self.strides[-1].bit_length() - 1):
            step = ConvNorm(in_channels=channels, out_channels=width, kernel_size=3, stride=2)
            self.steps.append(step)
            channels = width

    def forward(self, image: Tensor) -> list[Tensor]:
        """[B, 3, H, W] -> maps [B, C, H / stride, W / stride]."""
        maps, stride = [], 1
        for step in self.steps:
            image, stride = step(image), 2 * stride
            if stride in self.strides:
                maps.append(image)
        return maps


class TwoScales(nn.Module):
    """Two levels that know nothing of each other: the image, and its means over 8 x 8 cells.

    In the pyramid of a backbone the coarse map comes from the fine one, and would know its details.

    Args:
        width: C of both maps.
        only: Number of the level that is kept, of the same weights; None: both.
    """

    def __init__(self, *, width: int = WIDTH, only: int | None = None) -> None:
        super().__init__()
        fine = Stem((4,), width=width)
        coarse = nn.Sequential(
            ConvNorm(in_channels=3, out_channels=width, kernel_size=3),
            ConvNorm(in_channels=width, out_channels=width, kernel_size=3),
        )
        self.fine = None if only == 1 else fine
        self.coarse = None if only == 0 else coarse

    def forward(self, image: Tensor) -> list[Tensor]:
        """[B, 3, H, W] -> [B, C, H / 4, W / 4], [B, C, H / 8, W / 8], or one of them."""
        maps = [] if self.fine is None else self.fine(image)
        return maps if self.coarse is None else [*maps, self.coarse(F.avg_pool2d(image, 8))]


class Network(nn.Module):
    """Stem, body, classifier; logits are resized to the image.

    Args:
        stem: Image to maps.
        body: Maps to one map [B, C, h, w].
        num_classes: K.
        width: C.
    """

    def __init__(
        self, *, stem: nn.Module, body: nn.Module, num_classes: int, width: int = WIDTH
    ) -> None:
        super().__init__()
        self.stem = stem
        self.body = body
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, K, H, W]."""
        logits = self.classifier(self.body(self.stem(image)))
        return resize_bilinear(logits, image.shape[2:], align_corners=False)


class On(nn.Module):
    """A module applied to some of the maps of a stem.

    Args:
        module: Called with the maps.
        levels: Their numbers.
    """

    def __init__(self, module: nn.Module, *levels: int) -> None:
        super().__init__()
        self.module = module
        self.levels = levels

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps -> one map."""
        return self.module(*(maps[level] for level in self.levels))


def task_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of all pixels, plus that of the few that need the mechanism.

    Args:
        logits: [B, K, H, W].
        batch: Labels, and which pixels need it.

    Returns:
        Scalar.
    """
    needed = keep_labels(batch.label, batch.needs)
    return cross_entropy(logits, batch.label) + cross_entropy(logits, needed)
