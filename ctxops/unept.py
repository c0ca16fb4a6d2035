"""UN-EPT: context branch (Sec. 3.1) and spatial branch (Sec. 3.2).

The maps of a backbone become one sequence of tokens; encoder layers let every token look at a few
points of all maps, decoder layers let one query per output cell do the same. Only the encoder's
queries see positions: values carry none, and neither do the decoder's queries.

Letters: B batch, L levels, S tokens of all levels, Q queries = h w of the query grid, M heads,
N points per head and level, d width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ctxops.checks import check_choice, check_map, check_positive, check_tokens
from ctxops.deform_attention import DeformableAttention, check_level_shapes
from ctxops.deform_layers import DeformableDecoderLayer, DeformableEncoderLayer
from ctxops.norm import ConvNorm
from ctxops.position import cell_centres, pyramid_position
from ctxops.precision import widened_dtype
from ctxops.self_attention import FullAttention, ReleasedAttention

SELF_ATTENTIONS = ("deformable", "full", "released")


class ContextEncoder(nn.Module):
    """Encoder layers one after the other, the position added again in each.

    Args:
        layers: `DeformableEncoderLayer`s.
    """

    def __init__(self, layers: Sequence[DeformableEncoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(
        self, x: Tensor, position: Tensor, level_shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Encode the tokens of all levels; each looks from the centre of its own cell.

        Args:
            x: [B, S, d], the levels after each other.
            position: [S, d].
            level_shapes: L sizes (H_l, W_l).

        Returns:
            [B, S, d].

        Raises:
            TypeError: If a tensor is not floating point or a size not an integer.
            ValueError: If the shapes do not fit together.
        """
        check_tokens(x, "x")
        check_level_shapes(level_shapes, x.shape[1])
        dtype = widened_dtype(x.dtype)
        centres = [cell_centres(grid, dtype=dtype, device=x.device) for grid in level_shapes]
        # The same point of the image on every level.
        references = torch.cat(centres)[None, :, None].expand(-1, -1, len(level_shapes), -1)
        for layer in self.layers:
            x = layer(x, position, references, level_shapes)
        return x


class ContextDecoder(nn.Module):
    """Decoder layers one after the other.

    Args:
        layers: `DeformableDecoderLayer`s.
    """

    def __init__(self, layers: Sequence[DeformableDecoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(
        self,
        query: Tensor,
        query_grid: tuple[int, int],
        memory: Tensor,
        level_shapes: Sequence[tuple[int, int]],
    ) -> Tensor:
        """Decode one query per cell of the query grid.

        Args:
            query: [B, Q, d].
            query_grid: (h, w), Q = h w.
            memory: The encoder's tokens [B, S, d].
            level_shapes: L sizes (H_l, W_l).

        Returns:
            [B, Q, d].

        Raises:
            TypeError: If a tensor is not floating point or a size not an integer.
            ValueError: If the shapes do not fit together.
        """
        for layer in self.layers:
            query = layer(query, query_grid, memory, level_shapes)
        return query


class ContextBranch(nn.Module):
    """Encoder over the maps of a backbone, decoder for a map of queries (UN-EPT, Eq. 5).

    Maps and queries may have any sizes, from one call to the next.

    Args:
        embed_dim: d, a multiple of 4.
        num_levels: L.
        encoder: Called with (tokens, position, level shapes).
        decoder: Called with (queries, query grid, encoded tokens, level shapes).

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is not positive.
    """

    def __init__(
        self, *, embed_dim: int, num_levels: int, encoder: nn.Module, decoder: nn.Module
    ) -> None:
        super().__init__()
        check_positive(embed_dim, "embed_dim")
        check_positive(num_levels, "num_levels")
        self.embed_dim = embed_dim
        self.level_embed = nn.Parameter(torch.randn(num_levels, embed_dim))
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, features: Sequence[Tensor], queries: Tensor) -> Tensor:
        """Put context from all maps into the queries.

        Args:
            features: L maps [B, d, H_l, W_l].
            queries: Map [B, d, h, w].

        Returns:
            Map [B, d, h, w].

        Raises:
            TypeError: If a map is not floating point.
            ValueError: If the number of maps, their channels or batch sizes do not fit.
        """
        self._check(features, queries)
        level_shapes = [(x.shape[2], x.shape[3]) for x in features]
        tokens = torch.cat([_tokens(x) for x in features], dim=1)  # [B, S, d]
        position = pyramid_position(level_shapes, self.level_embed)
        memory = self.encoder(tokens, position, level_shapes)
        grid = queries.shape[2], queries.shape[3]
        decoded = self.decoder(_tokens(queries), grid, memory, level_shapes)
        return decoded.transpose(1, 2).unflatten(2, grid)  # [B, d, h, w]

    def _check(self, features: Sequence[Tensor], queries: Tensor) -> None:
        num_levels = self.level_embed.shape[0]
        if len(features) != num_levels:
            raise ValueError(
                f"features: expected {num_levels} maps, got {len(features)}; "
                "pass one map per level the module was built for"
            )
        check_map(queries, "queries", channels=self.embed_dim)
        for level, x in enumerate(features):
            check_map(x, f"features[{level}]", channels=self.embed_dim)
            if x.shape[0] != queries.shape[0]:
                raise ValueError(
                    f"features[{level}]: expected the batch size of the queries, "
                    f"{queries.shape[0]}, got {x.shape[0]}; pass maps of the same images"
                )


def build_context_branch(
    *,
    embed_dim: int = 256,
    num_heads: int = 8,
    num_levels: int = 3,
    num_points: int = 16,
    num_encoder_layers: int = 2,
    num_decoder_layers: int = 2,
    ffn_dim: int = 2048,
    dropout: float = 0.1,
    self_attention: str = "deformable",
    impl: str = "auto",
) -> ContextBranch:
    """The context branch of UN-EPT; defaults are the paper's (Sec. 4.1).

    Matrices are Xavier-uniform, deformable attention starts as it says, and scale embeddings are
    N(0, 1).

    Args:
        embed_dim: d, a multiple of 4.
        num_heads: M.
        num_levels: L.
        num_points: N, of the decoder's self-attention, too.
        num_encoder_layers: Number of encoder layers.
        num_decoder_layers: Number of decoder layers.
        ffn_dim: Hidden width of the feed-forward parts.
        dropout: Probability of dropping an element of a branch.
        self_attention: Among the decoder's queries: `deformable` (the paper's), `full` (each to
            all) or `released`, see `ReleasedAttention`.
        impl: As in `deformable_attention`.

    Returns:
        The module.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is not positive, M does not divide d, `dropout` is no probability, or
            `self_attention` or `impl` is unknown.
    """
    check_choice(self_attention, "self_attention", SELF_ATTENTIONS)
    check_positive(num_encoder_layers, "num_encoder_layers")
    check_positive(num_decoder_layers, "num_decoder_layers")

    def self_attn() -> nn.Module:
        if self_attention == "deformable":
            return DeformableAttention(
                embed_dim=embed_dim,
                num_heads=num_heads,
                num_levels=1,
                num_points=num_points,
                impl=impl,
            )
        kind = FullAttention if self_attention == "full" else ReleasedAttention
        return kind(embed_dim=embed_dim, num_heads=num_heads, dropout=dropout)

    encoder_layers = [
        DeformableEncoderLayer(
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_levels=num_levels,
            num_points=num_points,
            ffn_dim=ffn_dim,
            dropout=dropout,
            impl=impl,
        )
        for _ in range(num_encoder_layers)
    ]
    decoder_layers = [
        DeformableDecoderLayer(
            self_attn=self_attn(),
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_levels=num_levels,
            num_points=num_points,
            ffn_dim=ffn_dim,
            dropout=dropout,
            impl=impl,
        )
        for _ in range(num_decoder_layers)
    ]
    return ContextBranch(
        embed_dim=embed_dim,
        num_levels=num_levels,
        encoder=ContextEncoder(encoder_layers),
        decoder=ContextDecoder(decoder_layers),
    )


class SpatialBranch(nn.Module):
    """Three strided convolutions from the image to 1/8: details, and the queries (Sec. 3.2).

    Args:
        in_channels: Channels of the image.
        channels: Widths of the three blocks.
        norm: As in `make_norm`.
        last_relu: False leaves out the last ReLU, as the released code does.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is not positive, or `norm` is unknown.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        channels: tuple[int, int, int] = (64, 128, 256),
        norm: str = "BN",
        last_relu: bool = True,
    ) -> None:
        super().__init__()
        first, second, third = channels
        self.block1 = _halve(in_channels, first, norm, act=True)
        self.block2 = _halve(first, second, norm, act=True)
        self.block3 = _halve(second, third, norm, act=last_relu)

    def forward(self, image: Tensor) -> Tensor:
        """Image to map.

        Args:
            image: [B, in_channels, H, W].

        Returns:
            Map [B, C, ceil(H / 8), ceil(W / 8)], C the last of `channels`.

        Raises:
            TypeError: If `image` is not floating point.
            ValueError: If `image` is not [B, C, H, W].
        """
        return self.block3(self.block2(self.block1(image)))


def _halve(in_channels: int, out_channels: int, norm: str, *, act: bool) -> ConvNorm:
    """One block; its weights stay as PyTorch draws them."""
    return ConvNorm(
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=3,
        stride=2,
        norm=norm,
        bias=False,
        act=act,
        init=lambda conv: conv,
    )


def _tokens(x: Tensor) -> Tensor:
    """[B, d, H, W] -> [B, H W, d]."""
    return x.flatten(2).transpose(1, 2)
