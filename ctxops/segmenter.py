"""Segmenter: a ViT encoder, and a linear or a mask transformer decoder (Segmenter, Sec. 3).

The encoder is `ctxops.vit.VisionTransformer`. Names of parameters are those of the official model.

Letters: B batch, H W image, P patch, h w grid of patches, T = h w, K classes, d width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxops.checks import check_choice, check_positive, check_tokens
from ctxops.init import trunc_normal_
from ctxops.linear import Linear, linear
from ctxops.precision import autocast_off, widen
from ctxops.resize import crop, resize_bilinear
from ctxops.similarity import l2_normalize
from ctxops.tokens import layer_attention_map, pad_to_multiple, transformer_blocks
from ctxops.vit import VisionTransformer

# Last names of the parameters that weight decay leaves alone.
NO_WEIGHT_DECAY = ("pos_embed", "cls_token", "dist_token", "cls_emb")


def tokens_to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Put the tokens of a grid back into a map.

    Args:
        tokens: [B, T, C], row by row.
        grid: (h, w).

    Returns:
        [B, C, h, w].

    Raises:
        TypeError: If `tokens` is not floating point.
        ValueError: If `tokens` is not [B, T, C] with T = h w.
    """
    check_tokens(tokens, "tokens")
    if tokens.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"tokens: expected {grid[0]} * {grid[1]} of them for the grid {tuple(grid)}, got "
            f"{tokens.shape[1]}; pass patch tokens only, and the grid of the padded image"
        )
    return tokens.transpose(1, 2).unflatten(2, grid)


class LinearDecoder(nn.Module):
    """Class scores by one linear layer per patch (Segmenter, Sec. 3.2, "Linear").

    Args:
        in_channels: Width of the encoder.
        num_classes: K.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is not positive.
    """

    def __init__(self, *, in_channels: int, num_classes: int) -> None:
        super().__init__()
        check_positive(in_channels, "in_channels")
        check_positive(num_classes, "num_classes")
        self.in_channels = in_channels
        self.head = trunc_normal_(Linear(in_channels, num_classes))

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Score the patches.

        Args:
            tokens: Patch tokens [B, T, in_channels], row by row.
            grid: (h, w).

        Returns:
            Logits [B, K, h, w].

        Raises:
            TypeError: If `tokens` is not floating point.
            ValueError: If `tokens` does not fit the width or the grid.
        """
        check_tokens(tokens, "tokens", channels=self.in_channels)
        return tokens_to_map(self.head(tokens), grid)


class MaskTransformer(nn.Module):
    """Class embeddings join the patches; scores are cosines of the two (Segmenter, Eq. 4).

    K learnt class tokens follow the patch tokens through M layers. The score of a patch for a class
    is z cT of their L2-normalised projections, then LN over the classes.

    Deviation: the paper puts the LN behind the softmax, and yet lets the scores of a pixel sum to
    one; here, as in the released code, the softmax comes last, in the loss or in inference.

    Args:
        in_channels: Width of the encoder.
        num_classes: K.
        embed_dim: d of the decoder.
        num_heads: Heads of every layer.
        num_layers: M.
        dropout: As in `TransformerBlock`.
        drop_path_rate: Stochastic depth of the last layer, growing linearly from 0 at the first.
        layer_norm_eps: Of every LN.
        normalize_classes: False leaves the class embeddings of Eq. 4 at their length.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is not positive, the heads do not divide d, or a rate is no
            probability.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        embed_dim: int,
        num_heads: int,
        num_layers: int = 2,
        dropout: float = 0.1,
        drop_path_rate: float = 0.0,
        layer_norm_eps: float = 1e-5,
        normalize_classes: bool = True,
    ) -> None:
        super().__init__()
        check_positive(in_channels, "in_channels")
        check_positive(num_classes, "num_classes")
        self.in_channels, self.num_classes = in_channels, num_classes
        self.normalize_classes = normalize_classes
        self.proj_dec = trunc_normal_(Linear(in_channels, embed_dim))
        self.cls_emb = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(1, num_classes, embed_dim), std=0.02)
        )
        self.blocks = transformer_blocks(
            num_layers=num_layers,
            embed_dim=embed_dim,
            num_heads=num_heads,
            dropout=dropout,
            drop_path_rate=drop_path_rate,
            layer_norm_eps=layer_norm_eps,
        )
        self.decoder_norm = nn.LayerNorm(embed_dim, eps=layer_norm_eps)
        # Multiplied from the right, x W: the transpose of the weight of a linear layer.
        self.proj_patch = nn.Parameter(embed_dim**-0.5 * torch.randn(embed_dim, embed_dim))
        self.proj_classes = nn.Parameter(embed_dim**-0.5 * torch.randn(embed_dim, embed_dim))
        self.mask_norm = nn.LayerNorm(num_classes, eps=layer_norm_eps)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Score the patches.

        Args:
            tokens: Patch tokens [B, T, in_channels], row by row.
            grid: (h, w).

        Returns:
            Logits [B, K, h, w] in the dtype of `tokens`.

        Raises:
            TypeError: If `tokens` is not floating point.
            ValueError: If `tokens` does not fit the width or the grid.
        """
        scores = self.scores(tokens)
        norm = self.mask_norm
        with autocast_off(scores):
            weight, bias = widen(norm.weight), widen(norm.bias)
            masks = F.layer_norm(scores, (self.num_classes,), weight, bias, norm.eps)
        return tokens_to_map(masks.to(tokens.dtype), grid)

    def scores(self, tokens: Tensor) -> Tensor:
        """Eq. 4 before the last LN.

        Args:
            tokens: Patch tokens [B, T, in_channels].

        Returns:
            Cosines [B, T, K] in at least float32; in [-1, 1] with `normalize_classes`.

        Raises:
            TypeError: If `tokens` is not floating point.
            ValueError: If `tokens` does not fit the width.
        """
        x = self._joined(tokens)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_norm(x)
        patches = linear(x[:, : -self.num_classes], self.proj_patch.t())  # [B, T, d]
        classes = x[:, -self.num_classes :] @ self.proj_classes  # [B, K, d]
        with autocast_off(x):
            patches = l2_normalize(patches, dim=-1)
            classes = l2_normalize(classes, dim=-1) if self.normalize_classes else widen(classes)
            return patches @ classes.transpose(1, 2)

    def attention_map(self, tokens: Tensor, *, layer: int = -1) -> Tensor:
        """Softmax map of one layer.

        Args:
            tokens: Patch tokens [B, T, in_channels].
            layer: Index from 0; -1 is the last.

        Returns:
            [B, heads, T + K, T + K], the classes behind the patches. Call `eval()` first, or the
            layers before drop at random.

        Raises:
            TypeError: If `tokens` is not floating point.
            ValueError: If `tokens` does not fit the width, or there is no such layer.
        """
        return layer_attention_map(self.blocks, self._joined(tokens), layer=layer)

    def _joined(self, tokens: Tensor) -> Tensor:
        """[B, T + K, d]: patches, then classes."""
        check_tokens(tokens, "tokens", channels=self.in_channels)
        classes = self.cls_emb.expand(tokens.shape[0], -1, -1)
        return torch.cat([self.proj_dec(tokens), classes], dim=1)


class Segmenter(nn.Module):
    """Encoder and decoder of patches around padding, resizing and cropping (Segmenter, Fig. 2).

    A graph from `torch.export` with varying sizes takes multiples of P, another grid than that of
    training: whether to pad, and whether to resize the positions, is decided while tracing.

    Args:
        encoder: Image to patch tokens.
        decoder: `LinearDecoder`, `MaskTransformer`, or any module that takes tokens [B, T, d] and
            the grid (h, w) and returns logits [B, K, h, w].
    """

    def __init__(self, *, encoder: VisionTransformer, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, image: Tensor) -> Tensor:
        """Segment.

        Args:
            image: Normalised image [B, 3, H, W] of any size; zeros fill it up to multiples of P at
                the right and at the bottom.

        Returns:
            Logits [B, K, H, W], before any softmax.

        Raises:
            TypeError: If `image` is not floating point.
            ValueError: If `image` is not [B, 3, H, W], or the decoder is not made for the encoder.
        """
        padded = pad_to_multiple(image, self.encoder.patch_size)
        patch_logits = self.decoder(self.encoder(padded), self._grid_of(padded))
        # Where channels come last, resizing would copy all of its result once more.
        logits = resize_bilinear(patch_logits.contiguous(), padded.shape[2:], align_corners=False)
        return crop(logits, image.shape[2:])

    def attention_map(self, image: Tensor, *, part: str = "encoder", layer: int = -1) -> Tensor:
        """Softmax map of one layer; call `eval()` first, or the layers before drop at random.

        Args:
            image: As in `forward`.
            part: `encoder`, or `decoder` for those of a mask transformer.
            layer: Index from 0; -1 is the last.

        Returns:
            [B, heads, N, N]. Encoder: class token, distillation token if there is one, patches.
            Decoder: patches, classes. Patches are row by row on the grid of the padded image.

        Raises:
            TypeError: If `image` is not floating point.
            ValueError: If `image` does not fit, there is no such layer, or the decoder has none.
        """
        check_choice(part, "part", ("encoder", "decoder"))
        padded = pad_to_multiple(image, self.encoder.patch_size)
        if part == "encoder":
            return self.encoder.attention_map(padded, layer=layer)
        if not isinstance(self.decoder, MaskTransformer):
            raise ValueError(
                "part: expected a mask transformer to look into, got "
                f"{type(self.decoder).__name__}; use part='encoder'"
            )
        return self.decoder.attention_map(self.encoder(padded), layer=layer)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay, where it is used, leaves alone.

        Returns:
            Position tables, prefix tokens and class embeddings.
        """
        names = (name for name, _ in self.named_parameters())
        return {name for name in names if name.rpartition(".")[2] in NO_WEIGHT_DECAY}

    def _grid_of(self, padded: Tensor) -> tuple[int, int]:
        size = self.encoder.patch_size
        return padded.shape[2] // size, padded.shape[3] // size
