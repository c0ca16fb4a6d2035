"""Vision Transformer encoder of patches, with the parameter names of timm (Segmenter, Sec. 3.1).

The order of the tokens is: class token, distillation token if there is one, patches row by row.

Letters: B batch, H W image, P patch, h w grid of patches, T = h w, n prefix tokens, d width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ctxops.checks import check_choice, check_positive, check_probability
from ctxops.position import RESIZE_MODES, resize_position_embedding
from ctxops.tokens import PatchEmbedding, layer_attention_map, transformer_blocks

# Width, layers, heads of the named sizes (Segmenter, Table 1).
VARIANTS = {
    "Ti": (192, 12, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
}


class VisionTransformer(nn.Module):
    """Patches -> tokens + learnt positions -> pre-norm layers -> LN -> patch tokens.

    The ImageNet classifier (`head`, `head_dist`) does not exist here: it would get no gradient.

    Deviation: the paper mentions neither the class token nor the last LN; both belong to the
    pretrained networks. The position table is resized where the grid differs, not only where the
    number of tokens does.

    Args:
        image_size: (H, W) of training, in pixels; the position table is made for its grid.
        patch_size: P.
        embed_dim: d.
        num_layers: Number of layers.
        num_heads: Heads of every layer.
        distilled: Whether there is a distillation token (DeiT).
        dropout: Of positions, attention weights, attention output and both MLP layers.
        drop_path_rate: Stochastic depth of the last layer, growing linearly from 0 at the first.
        layer_norm_eps: 1e-5 as in the released Segmenter, 1e-6 in timm.
        pos_embed_resize: How the table gets to another grid, `bilinear` or `bicubic`.
        final_norm: False leaves the last LN out (UN-EPT takes maps before it).

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is not positive, the heads do not divide d, a rate is no probability,
            or `pos_embed_resize` is unknown.
    """

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        patch_size: int,
        embed_dim: int,
        num_layers: int,
        num_heads: int,
        distilled: bool = False,
        dropout: float = 0.0,
        drop_path_rate: float = 0.1,
        layer_norm_eps: float = 1e-5,
        pos_embed_resize: str = "bilinear",
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        for side in image_size:
            check_positive(side, "image_size")
        check_choice(pos_embed_resize, "pos_embed_resize", RESIZE_MODES)
        check_probability(dropout, "dropout")
        self.patch_embed = PatchEmbedding(embed_dim=embed_dim, patch_size=patch_size)
        self.patch_size = patch_size
        self.num_layers = num_layers
        self.grid = (-(-image_size[0] // patch_size), -(-image_size[1] // patch_size))
        self.num_prefix = 2 if distilled else 1
        self.pos_embed_resize = pos_embed_resize
        num_tokens = self.num_prefix + self.grid[0] * self.grid[1]
        self.cls_token = _vectors(1, embed_dim)
        if distilled:
            self.dist_token = _vectors(1, embed_dim)
        self.pos_embed = _vectors(num_tokens, embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = transformer_blocks(
            num_layers=num_layers,
            embed_dim=embed_dim,
            num_heads=num_heads,
            dropout=dropout,
            drop_path_rate=drop_path_rate,
            layer_norm_eps=layer_norm_eps,
        )
        self.norm = nn.LayerNorm(embed_dim, eps=layer_norm_eps) if final_norm else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        """Encode the patches.

        Args:
            image: [B, 3, H, W], H and W multiples of P.

        Returns:
            Patch tokens [B, T, d], row by row; the prefix is dropped.

        Raises:
            TypeError: If `image` is not floating point.
            ValueError: If `image` is not [B, 3, H, W], or a side is no multiple of P.
        """
        x = self.embed(image)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, self.num_prefix :]

    def embed(self, image: Tensor) -> Tensor:
        """What the first layer gets: prefix and patches, with their positions.

        Args:
            image: [B, 3, H, W], H and W multiples of P.

        Returns:
            [B, n + T, d].

        Raises:
            TypeError: If `image` is not floating point.
            ValueError: If `image` is not [B, 3, H, W], or a side is no multiple of P.
        """
        patches = self.patch_embed(image)
        prefix = [self.cls_token] + ([self.dist_token] if self.num_prefix == 2 else [])
        expanded = [token.expand(patches.shape[0], -1, -1) for token in prefix]
        tokens = torch.cat([*expanded, patches], dim=1)  # [B, n + T, d]
        return self.dropout(tokens + self.position(self._grid_of(image)))

    def position(self, grid: tuple[int, int]) -> Tensor:
        """The position table for a grid of patches.

        Args:
            grid: (h, w).

        Returns:
            [1, n + h w, d]; the parameter itself for the grid of training.
        """
        return resize_position_embedding(
            self.pos_embed,
            old_grid=self.grid,
            new_grid=grid,
            num_prefix=self.num_prefix,
            mode=self.pos_embed_resize,
        )

    def intermediate_maps(self, image: Tensor, *, after: Sequence[int]) -> list[Tensor]:
        """Patch tokens as maps after some of the layers, without the last LN (UN-EPT, Sec. 4.1).

        Layers behind the last one asked for are not run.

        Args:
            image: [B, 3, H, W], H and W multiples of P.
            after: Numbers of layers, rising, from 1: (4, 8, 12) is after every third of ViT-B.

        Returns:
            One map [B, d, h, w] per number.

        Raises:
            TypeError: If `image` is not floating point.
            ValueError: If `image` does not fit, or `after` is not rising in 1..L.
        """
        steps, last = list(after), self.num_layers
        if not steps or steps != sorted(set(steps)) or not 1 <= steps[0] <= steps[-1] <= last:
            raise ValueError(
                f"after: expected rising numbers of layers from 1 to {last}, got {steps}; "
                f"({last},) is after the last layer only"
            )
        height, width = self._grid_of(image)
        x = self.embed(image)
        maps = []
        for number in range(1, steps[-1] + 1):
            x = self.blocks[number - 1](x)
            if number in steps:
                patches = x[:, self.num_prefix :].transpose(1, 2)
                maps.append(patches.unflatten(2, (height, width)))  # [B, d, h, w]
        return maps

    def attention_map(self, image: Tensor, *, layer: int = -1) -> Tensor:
        """Softmax map of one layer.

        Args:
            image: [B, 3, H, W], H and W multiples of P.
            layer: Index from 0; -1 is the last.

        Returns:
            [B, heads, n + T, n + T], without dropout of weights; call `eval()` first, or the layers
            before drop at random.

        Raises:
            TypeError: If `image` is not floating point.
            ValueError: If `image` does not fit, or there is no such layer.
        """
        return layer_attention_map(self.blocks, self.embed(image), layer=layer)

    def _grid_of(self, image: Tensor) -> tuple[int, int]:
        return image.shape[2] // self.patch_size, image.shape[3] // self.patch_size


def build_vit(
    *,
    variant: str,
    image_size: tuple[int, int],
    patch_size: int = 16,
    distilled: bool = False,
    dropout: float = 0.0,
    drop_path_rate: float = 0.1,
    layer_norm_eps: float = 1e-5,
    pos_embed_resize: str = "bilinear",
    final_norm: bool = True,
) -> VisionTransformer:
    """A Vision Transformer of a named size.

    Args:
        variant: `Ti`, `S`, `B` or `L`, of width 192, 384, 768 or 1024.
        image_size: As in `VisionTransformer`.
        patch_size: P; 8, 16 and 32 have pretrained weights.
        distilled: As in `VisionTransformer`.
        dropout: As in `VisionTransformer`.
        drop_path_rate: As in `VisionTransformer`.
        layer_norm_eps: As in `VisionTransformer`.
        pos_embed_resize: As in `VisionTransformer`.
        final_norm: As in `VisionTransformer`.

    Returns:
        The encoder with random weights.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If `variant` is unknown, or an argument has a value it cannot have.
    """
    check_choice(variant, "variant", VARIANTS)
    embed_dim, num_layers, num_heads = VARIANTS[variant]
    return VisionTransformer(
        image_size=image_size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        distilled=distilled,
        dropout=dropout,
        drop_path_rate=drop_path_rate,
        layer_norm_eps=layer_norm_eps,
        pos_embed_resize=pos_embed_resize,
        final_norm=final_norm,
    )


def _vectors(count: int, channels: int) -> nn.Parameter:
    """[1, count, channels], normal of standard deviation 0.02 cut at +-2."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, count, channels), std=0.02))
