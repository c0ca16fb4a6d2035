"""Transformer layers around deformable attention, post-norm (UN-EPT, Sec. 3.1).

Letters: B batch, L levels, S tokens of all levels, Q queries = h w of the query grid, M heads,
N points per head and level, d width.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from ctxops.checks import check_positive, check_probability, check_tokens
from ctxops.deform_attention import DeformableAttention, check_level_shapes
from ctxops.dropout import dropout, relu_dropout
from ctxops.position import cell_centres
from ctxops.precision import widened_dtype


class PostNormLayer(nn.Module):
    """What encoder and decoder layers share: residual sums with dropout, and the feed-forward part.

    Args:
        embed_dim: d.
        ffn_dim: Hidden width of the feed-forward part.
        dropout: Probability of dropping an element of a branch.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is not positive or `dropout` no probability.
    """

    def __init__(self, *, embed_dim: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        check_positive(embed_dim, "embed_dim")
        check_positive(ffn_dim, "ffn_dim")
        check_probability(dropout, "dropout")
        self.linear1 = _linear(embed_dim, ffn_dim)
        self.linear2 = _linear(ffn_dim, embed_dim)
        self.dropout = dropout

    def feed_forward(self, x: Tensor) -> Tensor:
        """Two layers with a ReLU between, residual not added [B, N, d] -> [B, N, d]."""
        hidden = relu_dropout(self.linear1(x), self.dropout, training=self.training)
        return self.linear2(hidden)

    def add(self, x: Tensor, branch: Tensor, norm: nn.Module) -> Tensor:
        """LayerNorm of the residual sum, of one shape."""
        return norm(x + dropout(branch, self.dropout, training=self.training))


class DeformableEncoderLayer(PostNormLayer):
    """Deformable attention among the tokens of all levels, then a feed-forward part (Sec. 3.1).

    Args:
        embed_dim: d.
        num_heads: M.
        num_levels: L.
        num_points: N.
        ffn_dim: Hidden width of the feed-forward part.
        dropout: Probability of dropping an element of a branch.
        impl: As in `deformable_attention`.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is not positive, M does not divide d, or `dropout` is no probability.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 3,
        num_points: int = 16,
        ffn_dim: int = 2048,
        dropout: float = 0.1,
        impl: str = "auto",
    ) -> None:
        super().__init__(embed_dim=embed_dim, ffn_dim=ffn_dim, dropout=dropout)
        self.self_attn = DeformableAttention(
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_levels=num_levels,
            num_points=num_points,
            impl=impl,
        )
        self.norm1 = nn.LayerNorm(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        reference_points: Tensor,
        level_shapes: Sequence[tuple[int, int]],
    ) -> Tensor:
        """Update every token.

        Args:
            x: Tokens [B, S, d], the levels after each other.
            position: Added to the queries only, [B, S, d] or [S, d].
            reference_points: [B, S, L, 2] or [1, S, L, 2], see `DeformableAttention`.
            level_shapes: L sizes (H_l, W_l).

        Returns:
            [B, S, d].

        Raises:
            TypeError: If a tensor is not floating point.
            ValueError: If the shapes do not fit together.
        """
        attended = self.self_attn(x + position, reference_points, x, level_shapes)
        x = self.add(x, attended, self.norm1)
        return self.add(x, self.feed_forward(x), self.norm2)


class DeformableDecoderLayer(PostNormLayer):
    """Attention among queries, deformable attention into the encoder's tokens, feed-forward part.

    Args:
        self_attn: Attention among the queries, called like a `DeformableAttention` with one level,
            the query grid: (query, reference points, value, [grid]).
        embed_dim: d.
        num_heads: M.
        num_levels: L.
        num_points: N.
        ffn_dim: Hidden width of the feed-forward part.
        dropout: Probability of dropping an element of a branch.
        impl: As in `deformable_attention`.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is not positive, M does not divide d, or `dropout` is no probability.
    """

    def __init__(
        self,
        *,
        self_attn: nn.Module,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 3,
        num_points: int = 16,
        ffn_dim: int = 2048,
        dropout: float = 0.1,
        impl: str = "auto",
    ) -> None:
        super().__init__(embed_dim=embed_dim, ffn_dim=ffn_dim, dropout=dropout)
        self.cross_attn = DeformableAttention(
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_levels=num_levels,
            num_points=num_points,
            impl=impl,
        )
        self.num_levels = num_levels
        self.norm1 = nn.LayerNorm(embed_dim)
        self.self_attn = self_attn
        self.norm2 = nn.LayerNorm(embed_dim)
        self.norm3 = nn.LayerNorm(embed_dim)

    def forward(
        self,
        query: Tensor,
        query_grid: tuple[int, int],
        memory: Tensor,
        level_shapes: Sequence[tuple[int, int]],
    ) -> Tensor:
        """Update every query.

        Args:
            query: [B, Q, d], row-major on the query grid.
            query_grid: (h, w), Q = h w.
            memory: The encoder's tokens [B, S, d].
            level_shapes: L sizes (H_l, W_l) of the memory.

        Returns:
            [B, Q, d].

        Raises:
            TypeError: If a tensor is not floating point or a size not an integer.
            ValueError: If the shapes do not fit together.
        """
        check_tokens(query, "query")
        check_level_shapes([query_grid], query.shape[1])
        dtype = widened_dtype(query.dtype)
        centres = cell_centres(query_grid, dtype=dtype, device=query.device)[None, :, None]
        attended = self.self_attn(query, centres, query, [query_grid])
        # The norms are numbered as in the published weights, not in order of use.
        query = self.add(query, attended, self.norm2)
        references = centres.expand(-1, -1, self.num_levels, -1)
        attended = self.cross_attn(query, references, memory, level_shapes)
        query = self.add(query, attended, self.norm1)
        return self.add(query, self.feed_forward(query), self.norm3)


def _linear(in_features: int, out_features: int) -> nn.Linear:
    """Xavier-uniform weights; the biases as PyTorch draws them, as in the released code."""
    layer = nn.Linear(in_features, out_features)
    nn.init.xavier_uniform_(layer.weight)
    return layer
