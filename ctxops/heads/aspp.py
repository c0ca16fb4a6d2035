"""Atrous spatial pyramid pooling, ASPP, with image pooling (DeepLabv3, section 3.3).

Letters: B batch, C channels, H W map.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ctxops.checks import check_map, check_positive, check_probability
from ctxops.heads.pyramid_pooling import check_batch_statistics
from ctxops.norm import ConvNorm


class ASPP(nn.Module):
    """A 1x1, several dilated 3x3 convolutions and the image's mean, concatenated and projected.

    Every convolution is followed by a norm and a ReLU.

    Args:
        in_channels: C.
        out_channels: C', the width of every branch and of the output.
        dilations: Distances of the taps of the 3x3 convolutions.
        norm: Every norm, as in `make_norm`.
        dropout: Probability of dropping a value of the output in training.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is not positive, `norm` unknown, or `dropout` no probability.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int = 256,
        dilations: Sequence[int] = (12, 24, 36),
        norm: str = "BN",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check_positive(out_channels, "out_channels")
        check_probability(dropout, "dropout")
        for dilation in dilations:
            check_positive(dilation, "dilations")
        self.in_channels = in_channels

        def branch(kernel_size: int, dilation: int) -> ConvNorm:
            return ConvNorm(
                in_channels=in_channels,
                out_channels=out_channels,
                kernel_size=kernel_size,
                dilation=dilation,
                norm=norm,
            )

        self.pointwise = branch(1, 1)
        self.dilated = nn.ModuleDict({str(d): branch(3, d) for d in dilations})
        self.image = branch(1, 1)
        self.fuse = ConvNorm(
            in_channels=out_channels * (len(self.dilated) + 2),
            out_channels=out_channels,
            kernel_size=1,
            norm=norm,
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Look at every position at several distances.

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
        check_batch_statistics(x, cells=1, norm=self.image.norm)
        branches = [self.pointwise(x), *(branch(x) for branch in self.dilated.values())]
        image = self.image(x.mean((2, 3), keepdim=True))  # [B, C', 1, 1]
        branches.append(image.expand_as(branches[0]).to(branches[0].dtype))
        return self.dropout(self.fuse(torch.cat(branches, dim=1))).to(x.dtype)
