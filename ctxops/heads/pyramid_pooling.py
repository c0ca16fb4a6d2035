"""Pyramid pooling module, PPM ("Pyramid Scene Parsing Network", PSP).

Letters: B batch, C channels, H W map.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxops.checks import check_map, check_positive, check_probability
from ctxops.norm import ConvNorm
from ctxops.resize import resize_bilinear


def check_batch_statistics(x: Tensor, *, cells: int, norm: nn.Module) -> None:
    """Refuse a batch norm in training that would see a single value per channel.

    Args:
        x: Map [B, C, H, W] that is pooled.
        cells: Cells it is pooled to.
        norm: The norm on the pooled map; a SyncBatchNorm may have images in other processes.

    Raises:
        ValueError: If B * cells is 1 and `norm` averages over this batch alone.
    """
    averages = isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm) and norm.training
    if not averages or x.shape[0] * cells > 1:
        return
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if isinstance(norm, nn.SyncBatchNorm) and distributed:
        return
    raise ValueError(
        f"x: expected at least 2 images in training, because the norm of the image-wide pool is "
        f"a batch norm, got shape {tuple(x.shape)}; raise the batch size or use norm='GN'"
    )


class PyramidPooling(nn.Module):
    """Averages in grids of several sizes, each projected, resized and concatenated with the map.

    The map and its pyramid are then fused by one more convolution. The defaults are PSPNet's; the
    light form of real-time models has `bin_act=False` and `kernel_size=1`.

    Args:
        in_channels: C.
        out_channels: C'.
        bins: Cells per side of the grids.
        bin_channels: Width of each projected grid; None for C / number of bins.
        bin_act: Whether a ReLU follows the norm of a projected grid.
        kernel_size: Odd window of the last convolution.
        norm: Every norm, as in `make_norm`.
        dropout: Probability of dropping a channel of the output in training.
        align_corners: How grids are resized to the map, see `resize_bilinear`; PSPNet's code has
            True.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is not positive, `norm` unknown, `kernel_size` even, or `dropout`
            no probability.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        bins: Sequence[int] = (1, 2, 3, 6),
        bin_channels: int | None = None,
        bin_act: bool = True,
        kernel_size: int = 3,
        norm: str = "BN",
        dropout: float = 0.1,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        check_positive(in_channels, "in_channels")
        check_positive(len(bins), "number of bins")
        for size in bins:
            check_positive(size, "bins")
        check_probability(dropout, "dropout")
        width = in_channels // len(bins) if bin_channels is None else bin_channels
        self.in_channels = in_channels
        self.align_corners = align_corners
        self.bins = nn.ModuleDict(
            {
                str(size): ConvNorm(
                    in_channels=in_channels,
                    out_channels=width,
                    kernel_size=1,
                    norm=norm,
                    act=bin_act,
                )
                for size in bins
            }
        )
        self.fuse = ConvNorm(
            in_channels=in_channels + width * len(self.bins),
            out_channels=out_channels,
            kernel_size=kernel_size,
            norm=norm,
        )
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Put averages of several regions next to every position.

        Args:
            x: Map [B, C, H, W].

        Returns:
            Map [B, C', H, W], in the dtype of `x`.

        Raises:
            TypeError: If `x` is not floating point.
            ValueError: If `x` is not [B, C, H, W] with the C of the module, or a single image meets
                BN in training.
        """
        check_map(x, "x", channels=self.in_channels)
        maps = [x]
        for name, project in self.bins.items():
            size = int(name)
            check_batch_statistics(x, cells=size**2, norm=project.get_submodule("norm"))
            grid = project(F.adaptive_avg_pool2d(x, size)).to(x.dtype)
            maps.append(resize_bilinear(grid, x.shape[2:], align_corners=self.align_corners))
        return self.dropout(self.fuse(torch.cat(maps, dim=1))).to(x.dtype)
