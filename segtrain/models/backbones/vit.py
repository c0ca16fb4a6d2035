"""Plain vision transformers as backbones; parameters keep timm's names.

Letters: B batch, H W image, P patch, d width.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ctxops.vit import VisionTransformer
from segtrain.config.backbones import VitConfig
from segtrain.models.maps import MapInfo
from segtrain.models.pretrained import normalisation_of


class VitBackbone(VisionTransformer):
    """Patch tokens as maps behind some of the layers; there is no last norm (UN-EPT, Sec. 4.1).

    Args:
        blocks: Numbers of layers, rising, from 1; the last is the last layer.
        normalisation: The pixels it expects, `vit` or `imagenet`.
        **sizes: As in `ctxops.vit.VisionTransformer`.
    """

    def __init__(self, *, blocks: Sequence[int], normalisation: str, **sizes: Any) -> None:
        super().__init__(**sizes, final_norm=False)
        self.after = tuple(blocks)
        self.normalisation = normalisation
        self.multiple = self.patch_size
        info = MapInfo(channels=sizes["embed_dim"], stride=self.patch_size)
        self.maps = {f"b{number}": info for number in self.after}

    def forward(self, image: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Compute the maps.

        Args:
            image: [B, 3, H, W], H and W multiples of P.

        Returns:
            "b4", "b8", ...: [B, d, H / P, W / P], named by the layer.

        Raises:
            TypeError: If `image` is not floating point.
            ValueError: If `image` is not [B, 3, H, W], or a side is no multiple of P.
        """
        found = self.intermediate_maps(image, after=self.after)
        return dict(zip(self.maps, found, strict=True))

    def no_weight_decay(self) -> set[str]:
        """Names of the position table and the tokens."""
        own = {"cls_token", "pos_embed"}
        return own | {"dist_token"} if self.num_prefix == 2 else own


def build_vit_backbone(config: VitConfig, *, image_size: tuple[int, int]) -> VitBackbone:
    """Build a vision transformer with random weights.

    Args:
        config: The section.
        image_size: (H, W) of a training crop: the position table is made for its grid.

    Returns:
        The backbone.

    Raises:
        UserError: If `pretrained` does not fit the section.
    """
    embed_dim, num_layers, num_heads = config.widths
    return VitBackbone(
        blocks=config.blocks,
        normalisation=normalisation_of(config),
        image_size=image_size,
        patch_size=config.patch_size,
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        distilled=config.distilled,
        dropout=config.dropout,
        drop_path_rate=config.drop_path_rate,
        layer_norm_eps=config.layer_norm_eps,
        pos_embed_resize=config.pos_embed_resize,
    )
