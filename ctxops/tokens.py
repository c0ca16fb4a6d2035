"""Transformer on tokens: patches, multi-head self-attention, MLP, the pre-norm block (ViT).

Letters: B batch, C channels, H W image, P patch, T patches, N tokens, d width, h heads.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ctxops.checks import check_divides, check_map, check_positive, check_probability, check_tokens
from ctxops.drop import DropPath
from ctxops.init import trunc_normal_
from ctxops.linear import Linear, gelu_linear
from ctxops.plain import has_hooks
from ctxops.precision import autocast_off, widen
from ctxops.softmax_chunks import chunked_attention, takes_chunks

MLP_RATIO = 4


def pad_to_multiple(image: Tensor, multiple: int, *, value: float = 0.0) -> Tensor:
    """Pad right and bottom until both sides are multiples; the top left corner stays.

    Args:
        image: [B, C, H, W].
        multiple: What the sides shall be multiples of.
        value: What the new pixels hold.

    Returns:
        [B, C, H', W']; `image` itself where nothing is missing.

    Raises:
        TypeError: If `image` is not floating point, or `multiple` not an integer.
        ValueError: If `image` is not [B, C, H, W], or `multiple` is below 1.
    """
    check_map(image, "image")
    check_positive(multiple, "multiple")
    height, width = image.shape[2:]
    # Not -height % multiple: compilers of dynamic shapes stumble over the modulus.
    bottom = (height + multiple - 1) // multiple * multiple - height
    right = (width + multiple - 1) // multiple * multiple - width
    if bottom == 0 and right == 0:
        return image
    return F.pad(image, [0, right, 0, bottom], value=value)


def attention_weights(query: Tensor, key: Tensor) -> Tensor:
    """The softmax map of dot-product attention, softmax(q kT / sqrt(d)) (Segmenter, Sec. 3.1).

    For looking at. The modules here never materialise it: PyTorch's fused attention does not.

    Args:
        query: [B, h, N, d].
        key: [B, h, M, d].

    Returns:
        [B, h, N, M] in at least float32, every row summing to 1.
    """
    with autocast_off(query):
        scores = widen(query) @ widen(key).transpose(-2, -1) * query.shape[-1] ** -0.5
        return scores.softmax(-1)


class PatchEmbedding(nn.Module):
    """Image to tokens: one linear map of every P x P patch (Segmenter, Sec. 3.1).

    Args:
        in_channels: C.
        embed_dim: d.
        patch_size: P.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is not positive.
    """

    def __init__(self, *, in_channels: int = 3, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        check_positive(in_channels, "in_channels")
        check_positive(embed_dim, "embed_dim")
        check_positive(patch_size, "patch_size")
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, embed_dim, patch_size, stride=patch_size)

    def forward(self, image: Tensor) -> Tensor:
        """Embed the patches, row by row.

        Args:
            image: [B, C, H, W], H and W multiples of P.

        Returns:
            Tokens [B, H W / P^2, d].

        Raises:
            TypeError: If `image` is not floating point.
            ValueError: If `image` is not [B, C, H, W], or a side is no multiple of P.
        """
        check_map(image, "image", channels=self.in_channels)
        if image.shape[2] % self.patch_size or image.shape[3] % self.patch_size:
            raise ValueError(
                f"image: expected sides that are multiples of {self.patch_size}, got "
                f"{tuple(image.shape[2:])}; use pad_to_multiple(image, {self.patch_size})"
            )
        return self.proj(image).flatten(2).transpose(1, 2)  # [B, T, d]


class SelfAttention(nn.Module):
    """Multi-head self-attention, softmax(q kT / sqrt(d / h)) v (Segmenter, Sec. 3.1).

    The softmax is accumulated in float32 inside PyTorch's attention, half precision included.
    Many tokens in float32 on a CPU go through `softmax_chunks` instead, without second derivatives.

    Args:
        embed_dim: d.
        num_heads: h, a divisor of d.
        dropout: Probability of dropping an attention weight, and a feature of the output.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is not positive, h does not divide d, or `dropout` is no probability.
    """

    def __init__(self, *, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        check_positive(embed_dim, "embed_dim")
        check_positive(num_heads, "num_heads")
        check_divides(num_heads, embed_dim, "num_heads and embed_dim")
        check_probability(dropout, "dropout")
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = trunc_normal_(Linear(embed_dim, 3 * embed_dim))
        self.proj = trunc_normal_(Linear(embed_dim, embed_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Attend.

        Args:
            x: Tokens [B, N, d].

        Returns:
            [B, N, d].
        """
        dropout = self.dropout if self.training else 0.0
        qkv = self._packed(x)
        if takes_chunks(qkv):
            out = chunked_attention(qkv, dropout_p=dropout).flatten(2)  # [B, N, d]
        else:
            query, key, value = _split(qkv)
            out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
            out = out.transpose(1, 2).flatten(2)  # [B, N, d]
        return F.dropout(self.proj(out), self.dropout, self.training)

    def attention_map(self, x: Tensor) -> Tensor:
        """The softmax map, without dropout.

        Args:
            x: Tokens [B, N, d].

        Returns:
            [B, h, N, N]; row: the token that looks, column: the token looked at.
        """
        query, key, _ = self._heads(x)
        return attention_weights(query, key)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each [B, h, N, d / h]."""
        return _split(self._packed(x))

    def _packed(self, x: Tensor) -> Tensor:
        """Query, key and value side by side, [B, N, 3, h, d / h]."""
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1))

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"num_heads={self.num_heads}, dropout={self.dropout}"


def _split(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, each [B, h, N, d / h]."""
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


class MLP(nn.Module):
    """Two linear layers with an exact GELU between them, dropout after each.

    Args:
        embed_dim: d.
        hidden_dim: Width between the layers.
        dropout: Probability of dropping a feature.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is not positive, or `dropout` is no probability.
    """

    def __init__(self, *, embed_dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        check_positive(embed_dim, "embed_dim")
        check_positive(hidden_dim, "hidden_dim")
        check_probability(dropout, "dropout")
        self.fc1 = trunc_normal_(Linear(embed_dim, hidden_dim))
        self.fc2 = trunc_normal_(Linear(hidden_dim, embed_dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Transform every token on its own.

        Args:
            x: Tokens [B, N, d].

        Returns:
            [B, N, d].
        """
        hidden = self.fc1(x)
        if (self.training and self.dropout.p > 0) or not _is_bare(self.fc2):
            return self.dropout(self.fc2(self.dropout(F.gelu(hidden))))
        return gelu_linear(hidden, self.fc2.weight, self.fc2.bias)


def _is_bare(layer: nn.Module) -> bool:
    """Whether nobody has replaced the layer (by an adapter) or hooked himself onto its call."""
    return type(layer) is Linear and not has_hooks(layer)


class TransformerBlock(nn.Module):
    """Pre-norm layer: x + MSA(LN(x)), then x + MLP(LN(x)) (Segmenter, Eqs. 1 and 2).

    Args:
        embed_dim: d.
        num_heads: h, a divisor of d.
        dropout: As in `SelfAttention` and `MLP`.
        drop_path_rate: Probability of dropping each of the two branches of an image.
        layer_norm_eps: Added to the variance in LN.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is not positive, h does not divide d, or a rate is no probability.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.attn = SelfAttention(embed_dim=embed_dim, num_heads=num_heads, dropout=dropout)
        self.mlp = MLP(embed_dim=embed_dim, hidden_dim=MLP_RATIO * embed_dim, dropout=dropout)
        self.norm1 = nn.LayerNorm(embed_dim, eps=layer_norm_eps)
        self.norm2 = nn.LayerNorm(embed_dim, eps=layer_norm_eps)
        self.drop_path = DropPath(drop_path_rate=drop_path_rate)
        self.embed_dim = embed_dim

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens, then transform each.

        Args:
            x: Tokens [B, N, d].

        Returns:
            [B, N, d].

        Raises:
            TypeError: If `x` is not floating point.
            ValueError: If `x` is not [B, N, d].
        """
        check_tokens(x, "x", channels=self.embed_dim)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attention_map(self, x: Tensor) -> Tensor:
        """The softmax map of this layer.

        Args:
            x: What the layer gets, [B, N, d].

        Returns:
            [B, h, N, N], without dropout.

        Raises:
            TypeError: If `x` is not floating point.
            ValueError: If `x` is not [B, N, d].
        """
        check_tokens(x, "x", channels=self.embed_dim)
        return self.attn.attention_map(self.norm1(x))


def transformer_blocks(
    *,
    num_layers: int,
    embed_dim: int,
    num_heads: int,
    dropout: float = 0.0,
    drop_path_rate: float = 0.0,
    layer_norm_eps: float = 1e-5,
) -> nn.ModuleList:
    """Layers whose stochastic depth grows linearly from 0 to `drop_path_rate`.

    Args:
        num_layers: How many.
        embed_dim: d.
        num_heads: h.
        dropout: Of every layer.
        drop_path_rate: Of the last layer; a single layer has 0.
        layer_norm_eps: Of every layer.

    Returns:
        The layers, first to last.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is not positive, h does not divide d, or a rate is no probability.
    """
    check_positive(num_layers, "num_layers")
    check_probability(drop_path_rate, "drop_path_rate")
    return nn.ModuleList(
        TransformerBlock(
            embed_dim=embed_dim,
            num_heads=num_heads,
            dropout=dropout,
            drop_path_rate=drop_path_rate * layer / max(num_layers - 1, 1),
            layer_norm_eps=layer_norm_eps,
        )
        for layer in range(num_layers)
    )


def layer_attention_map(blocks: nn.ModuleList, x: Tensor, *, layer: int) -> Tensor:
    """Run the layers before one, and return the softmax map of that one.

    Args:
        blocks: Layers as of `transformer_blocks`.
        x: What the first layer gets, [B, N, d].
        layer: Index from 0; negative ones count from the end.

    Returns:
        [B, h, N, N].

    Raises:
        TypeError: If `x` is not floating point.
        ValueError: If `x` is not [B, N, d], or there is no such layer.
    """
    if not -len(blocks) <= layer < len(blocks):
        raise ValueError(
            f"layer: expected an index of {len(blocks)} layers, got {layer}; use 0 to "
            f"{len(blocks) - 1}, or -1 for the last"
        )
    *before, wanted = blocks[: layer % len(blocks) + 1]
    for block in before:
        x = block(x)
    assert isinstance(wanted, TransformerBlock), "transformer_blocks makes nothing else"
    return wanted.attention_map(x)
