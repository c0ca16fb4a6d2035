"""Pyramids of four maps of one size from a single backbone map (FPT, 3.5, Tables 4 and 5).

`UnscathedPyramid` is what FPT stands on in semantic segmentation, the other two are compared with
it. The list order, fine to coarse, is that of the receptive fields.

Letters: B batch, C channels of the backbone map, D pyramid width, H W map, k window.
"""

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ctxops.checks import check_map, check_odd, check_positive
from ctxops.init import fan_in_uniform_
from ctxops.norm import ConvNorm, make_norm
from ctxops.resize import resize_bilinear


class GlobalConvolution(nn.Module):
    """GCN: a k x k window from thin convolutions, (k x 1, 1 x k) + (1 x k, k x 1).

    From Peng et al., Large Kernel Matters, which the FPT paper cites. Nothing between the
    convolutions, and no biases.

    Args:
        channels: D.
        kernel_size: k, odd.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If `kernel_size` is even or a size not positive.
    """

    def __init__(self, *, channels: int, kernel_size: int) -> None:
        super().__init__()
        check_positive(channels, "channels")
        check_odd(kernel_size, "kernel_size")
        self.channels = channels
        self.column_first = _thin_pair(channels, (kernel_size, 1))
        self.row_first = _thin_pair(channels, (1, kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve.

        Args:
            x: Map [B, D, H, W].

        Returns:
            Map [B, D, H, W].

        Raises:
            TypeError: If `x` is not floating point.
            ValueError: If `x` is not [B, D, H, W] with the D of the module.
        """
        check_map(x, "x", channels=self.channels)
        return self.column_first(x) + self.row_first(x)


class ThinConvolution(nn.Conv2d):
    """Convolution with a window of one row or one column that keeps the size, without bias.

    oneDNN's gradient of a window of 31 x 1 writes beyond its memory for maps of 10 to 16 rows
    (PyTorch 2.15, AVX-512), so that the process crashes now or later. Rows of zeros that are cut
    off again keep it away and change nothing: the padding is zeros as well.

    Args:
        channels: D.
        window: (k, 1) or (1, k), k odd.
    """

    def __init__(self, *, channels: int, window: tuple[int, int]) -> None:
        padding = window[0] // 2, window[1] // 2
        super().__init__(channels, channels, window, padding=padding, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve.

        Args:
            x: Map [B, D, H, W].

        Returns:
            Map [B, D, H, W].
        """
        rows = x.shape[2]
        lacking = max(self.kernel_size[0] // 2 + 2 - rows, 0)
        if not lacking or self.kernel_size[0] == 1:
            return super().forward(x)
        return super().forward(F.pad(x, [0, 0, 0, lacking]))[:, :, :rows]


class _BranchPyramid(nn.Module):
    """Base: parallel branches on one map, resized to its size where they come out smaller."""

    def __init__(self, *, in_channels: int, branches: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.branches = nn.ModuleDict(branches)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Compute the pyramid.

        Args:
            x: Backbone map [B, C, H, W].

        Returns:
            One map [B, D, H, W] per branch.

        Raises:
            TypeError: If `x` is not floating point.
            ValueError: If `x` is not [B, C, H, W] with the C of the module.
        """
        check_map(x, "x", channels=self.in_channels)
        maps = [branch(x) for branch in self.branches.values()]
        return [
            y
            if y.shape[2:] == x.shape[2:]
            else resize_bilinear(y, x.shape[2:], align_corners=False)
            for y in maps
        ]


class UnscathedPyramid(_BranchPyramid):
    """UFP: per branch a 1x1 convolution and a global convolution, both with norm and ReLU.

    Deviation: the paper tells windows and width only. Global convolutions straight on the backbone
    map would exceed its parameter count, hence the 1x1 convolutions.

    Args:
        in_channels: C.
        out_channels: D.
        kernel_sizes: k of the branches, small to large, odd.
        norm: As in `make_norm`. The paper trains with `SyncBN`.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is impossible or `norm` unknown.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int = 256,
        kernel_sizes: Sequence[int] = (1, 7, 15, 31),
        norm: str = "BN",
    ) -> None:
        branches = {}
        for kernel_size in kernel_sizes:
            branch = nn.Sequential()
            branch.add_module("reduce", _pointwise(in_channels, out_channels, norm))
            gcn = GlobalConvolution(channels=out_channels, kernel_size=kernel_size)
            branch.add_module("gcn", gcn)
            branch.add_module("norm", make_norm(norm, out_channels))
            branch.add_module("act", nn.ReLU())
            branches[f"k{kernel_size}"] = branch
        super().__init__(in_channels=in_channels, branches=branches)


class PoolingPyramid(_BranchPyramid):
    """PPM: per branch the map averaged to s x s cells, a 1x1 convolution with norm and ReLU.

    With batch norm and one image, the branch of one cell has a single value per channel to
    normalise and cannot train.

    Args:
        in_channels: C.
        out_channels: D.
        cells: s of the branches, many to few.
        norm: As in `make_norm`.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is impossible or `norm` unknown.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int = 256,
        cells: Sequence[int] = (6, 3, 2, 1),
        norm: str = "BN",
    ) -> None:
        branches = {}
        for count in cells:
            check_positive(count, "cells")
            branch = nn.Sequential()
            branch.add_module("pool", nn.AdaptiveAvgPool2d(count))
            branch.add_module("reduce", _pointwise(in_channels, out_channels, norm))
            branches[f"cells{count}"] = branch
        super().__init__(in_channels=in_channels, branches=branches)


class AtrousPyramid(_BranchPyramid):
    """ASPP: a 1x1 convolution and dilated 3x3 convolutions, with norm and ReLU each.

    Deviation: no branch of image pooling, the paper counts four levels.

    Args:
        in_channels: C.
        out_channels: D.
        dilations: Of the 3x3 convolutions, small to large.
        norm: As in `make_norm`.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is impossible or `norm` unknown.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int = 256,
        dilations: Sequence[int] = (12, 24, 36),
        norm: str = "BN",
    ) -> None:
        branches = {"point": _pointwise(in_channels, out_channels, norm)}
        for dilation in dilations:
            check_positive(dilation, "dilations")
            branches[f"dilation{dilation}"] = ConvNorm(
                in_channels=in_channels,
                out_channels=out_channels,
                kernel_size=3,
                dilation=dilation,
                norm=norm,
            )
        super().__init__(in_channels=in_channels, branches=branches)


def _pointwise(in_channels: int, out_channels: int, norm: str) -> ConvNorm:
    check_positive(out_channels, "out_channels")
    return ConvNorm(in_channels=in_channels, out_channels=out_channels, kernel_size=1, norm=norm)


def _thin_pair(channels: int, first: tuple[int, int]) -> nn.Sequential:
    """Convolution with the given window, then one with the window turned."""
    pair = nn.Sequential()
    for name, window in (("first", first), ("second", first[::-1])):
        conv = ThinConvolution(channels=channels, window=window)
        pair.add_module(name, fan_in_uniform_(conv))
    return pair
