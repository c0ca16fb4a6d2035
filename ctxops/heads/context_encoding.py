"""Context encoding, EncNet ("Context Encoding for Semantic Segmentation"), without its loss.

Letters: B batch, C channels, H W map, N = HW positions, K codewords.
"""

import math

import torch
from torch import Tensor, nn

from ctxops.checks import check_map, check_positive
from ctxops.init import kaiming_normal_, xavier_
from ctxops.norm import ConvNorm
from ctxops.precision import autocast_off, widen
from ctxops.squeeze import make_node_norm


def encode(features: Tensor, codewords: Tensor, scales: Tensor) -> Tensor:
    """e_k = sum_i a_ik (x_i - c_k), a_i = softmax over k of -s_k |x_i - c_k|^2 (Eq. 1).

    No [N, K, C] residuals are formed: |x - c|^2 = x.x - 2 x.c + c.c, and x.x does not depend on k
    beyond its product with s_k.

    Args:
        features: [B, N, C].
        codewords: [K, C].
        scales: s [K].

    Returns:
        Encodings [B, K, C].
    """
    squared = features.square().sum(2, keepdim=True) + codewords.square().sum(1)  # [B, N, K]
    distances = squared - 2 * features @ codewords.t()
    weights = (-scales * distances).softmax(2)  # [B, N, K]
    return weights.transpose(1, 2) @ features - weights.sum(1)[..., None] * codewords


class ContextEncoding(nn.Module):
    """y = ReLU(x + x * sigmoid(W e)), e the mean of the normalised encodings (section 3.1).

    Args:
        in_channels: C.
        num_codewords: K.
        norm: `BN` or `SyncBN`, or `""` for none.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is not positive or `norm` unknown.
    """

    def __init__(self, *, in_channels: int, num_codewords: int = 32, norm: str = "BN") -> None:
        super().__init__()
        check_positive(in_channels, "in_channels")
        check_positive(num_codewords, "num_codewords")
        self.in_channels = in_channels
        self.features = ConvNorm(
            in_channels=in_channels,
            out_channels=in_channels,
            kernel_size=1,
            norm=norm,
            bias=False,
            init=kaiming_normal_,
        )
        bound = 1 / math.sqrt(num_codewords * in_channels)
        self.codewords = nn.Parameter(
            torch.empty(num_codewords, in_channels).uniform_(-bound, bound)
        )
        self.scales = nn.Parameter(torch.empty(num_codewords).uniform_(0, 1))
        self.norm = make_node_norm(norm, num_codewords)
        self.gate = xavier_(nn.Linear(in_channels, in_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels by what the image contains.

        Args:
            x: Map [B, C, H, W].

        Returns:
            Map [B, C, H, W], in the dtype of `x`.

        Raises:
            TypeError: If `x` is not floating point.
            ValueError: If `x` is not [B, C, H, W] with the C of the module.
        """
        check_map(x, "x", channels=self.in_channels)
        features = self.features(x).flatten(2).transpose(1, 2)  # [B, N, C]
        with autocast_off(x):
            wide = widen(features).to(self.codewords.dtype)
            encodings = self.norm(encode(wide, self.codewords, self.scales)).relu()
            gate = self.gate(encodings.mean(1)).sigmoid()  # [B, C]
        return (x + x * gate[:, :, None, None].to(x.dtype)).relu()
