"""Reasoning over a set of vectors with a graph convolution whose adjacency is attention (Eq. 4).

Letters: B batch, c width of a vector, N vectors.
"""

from torch import Tensor, nn

from ctxops.checks import check_positive
from ctxops.init import conv1d
from ctxops.similarity import scaled_cosine_attention

# The adjacency is computed in vectors this many times narrower (c / 4 in Eq. 4).
REDUCTION = 4


class GraphReasoning(nn.Module):
    """G~ = (W_3 G) CF(W_1 G, W_2 G, c / 4) + G (A²-FPN, Eq. 4).

    Equivariant to a permutation of the vectors. No activation and no normalisation layer.

    Args:
        channels: c, a multiple of 4.
        normalize_query: False gives the literal Eq. 3, see `scaled_cosine_attention`.

    Raises:
        ValueError: If `channels` is not a positive multiple of 4.
    """

    def __init__(self, *, channels: int, normalize_query: bool = True) -> None:
        super().__init__()
        check_positive(channels, "channels")
        if channels % REDUCTION:
            raise ValueError(
                f"channels: expected a multiple of {REDUCTION}, got {channels}; "
                f"use {channels + REDUCTION - channels % REDUCTION}"
            )
        self.normalize_query = normalize_query
        self.query = conv1d(channels, channels // REDUCTION)
        self.key = conv1d(channels, channels // REDUCTION)
        self.value = conv1d(channels, channels)

    def forward(self, nodes: Tensor) -> Tensor:
        """Exchange information between the vectors.

        Args:
            nodes: Context vectors G [B, c, N].

        Returns:
            Context vectors [B, c, N].
        """
        messages = scaled_cosine_attention(
            self.query(nodes).transpose(1, 2),
            self.key(nodes).transpose(1, 2),
            self.value(nodes).transpose(1, 2),
            normalize_query=self.normalize_query,
        )
        return messages.transpose(1, 2) + nodes
