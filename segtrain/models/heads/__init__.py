"""Heads: one file per kind, found by the `name` of their section."""

from collections.abc import Callable

from torch import nn

from segtrain.config.heads import HeadConfig
from segtrain.models.heads.context import build_context_head
from segtrain.models.heads.deeplab_plus import build_deeplab_plus_head
from segtrain.models.heads.df import build_df_head
from segtrain.models.heads.fpt import build_fpt_head
from segtrain.models.heads.mlp import build_mlp_head
from segtrain.models.heads.pyramids import build_aspp_head, build_psp_head
from segtrain.models.heads.unept import build_unept_head
from segtrain.models.maps import Maps

__all__ = ["HEADS", "build_head"]

HEADS: dict[str, Callable[..., nn.Module]] = {
    "aspp": build_aspp_head,
    "context": build_context_head,
    "deeplab_plus": build_deeplab_plus_head,
    "df": build_df_head,
    "fpt": build_fpt_head,
    "mlp": build_mlp_head,
    "psp": build_psp_head,
    "unept": build_unept_head,
}


def build_head(
    config: HeadConfig, maps: Maps, *, num_classes: int, image_size: tuple[int, int]
) -> nn.Module:
    """Build a head with random weights.

    Args:
        config: The section `model.head`.
        maps: What the backbone offers.
        num_classes: K.
        image_size: (H, W) of a training crop.

    Returns:
        A module from (the backbone's maps, images [B, 3, H, W]) to {"logits": [B, K, h, w]} and
        what else its loss needs, [B, C, H, W]. `classifier` is the part whose shape depends on K;
        where it has tables, `no_weight_decay()`.

    Raises:
        UserError: If the backbone lacks a map, or the configuration contradicts itself.
    """
    return HEADS[config.name](config, maps, num_classes=num_classes, image_size=image_size)
