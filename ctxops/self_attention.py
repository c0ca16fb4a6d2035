"""Attention among the queries of UN-EPT's decoder that is not deformable: full, and as released.

Both are called like `DeformableAttention`, so that one can take the other's place; they need no
positions and ignore them. Names and layout of the parameters are those of `nn.MultiheadAttention`.

Letters: B batch, Q queries, S value tokens, M heads, d width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxops.checks import check_divides, check_positive, check_probability, check_tokens
from ctxops.init import xavier_
from ctxops.precision import autocast_off, widen


class FullAttention(nn.Module):
    """Multi-head attention of every query to every value token (UN-EPT, Eq. 1).

    Args:
        embed_dim: d.
        num_heads: M.
        dropout: Probability of dropping an attention weight.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is not positive, M does not divide d, or `dropout` is no probability.
    """

    def __init__(self, *, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        check_positive(embed_dim, "embed_dim")
        check_positive(num_heads, "num_heads")
        check_divides(num_heads, embed_dim, "num_heads and embed_dim")
        check_probability(dropout, "dropout")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim))
        self.out_proj = xavier_(nn.Linear(embed_dim, embed_dim))
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        level_shapes: Sequence[tuple[int, int]],
    ) -> Tensor:
        """Attend; the softmax is in at least float32.

        Args:
            query: [B, Q, d].
            reference_points: Ignored.
            value: [B, S, d].
            level_shapes: Ignored.

        Returns:
            [B, Q, d].

        Raises:
            TypeError: If a tensor is not floating point.
            ValueError: If a tensor is not [B, N, d].
        """
        check_tokens(query, "query", channels=self.embed_dim)
        check_tokens(value, "value", channels=self.embed_dim)
        return self._attend(query, value)

    def _attend(self, query: Tensor, value: Tensor) -> Tensor:
        """[B, Q, d], [B, S, d] -> [B, Q, d]."""
        projected = self._project(0, query), self._project(1, value), self._project(2, value)
        q, k, v = (
            widen(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in projected
        )  # [B, M, N, d / M]
        dropout = self.dropout if self.training else 0.0
        with autocast_off(query):
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.out_proj(out.transpose(1, 2).flatten(2).to(projected[2].dtype))

    def _project(self, part: int, x: Tensor) -> Tensor:
        """The projection of queries (part 0), keys (1) or values (2)."""
        rows = slice(part * self.embed_dim, (part + 1) * self.embed_dim)
        return F.linear(x, self.in_proj_weight[rows], self.in_proj_bias[rows])

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}"


class ReleasedAttention(FullAttention):
    """The self-attention of UN-EPT's released code, which attends across the batch, not the map.

    In training, query i of an image attends to query i of all images of the batch. With one image
    this is the projection of the values and of the output, whatever the queries and keys are.

    Deviation: in evaluation it is always that projection, so that a result does not depend on the
    other images of a batch; the released code is only ever evaluated with one.
    """

    def _attend(self, query: Tensor, value: Tensor) -> Tensor:
        """[B, Q, d], [B, Q, d] -> [B, Q, d]."""
        if not self.training:
            return self.out_proj(self._project(2, value))
        across = super()._attend(query.transpose(0, 1), value.transpose(0, 1))
        return across.transpose(0, 1)
