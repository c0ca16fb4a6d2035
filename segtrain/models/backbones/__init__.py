"""Backbones: one file per kind, found by the `name` of their section."""

from collections.abc import Callable

from torch import nn

from segtrain.config.backbones import BackboneConfig
from segtrain.models.backbones.df import build_df
from segtrain.models.backbones.resnet import build_resnet
from segtrain.models.backbones.timm_model import build_timm
from segtrain.models.backbones.vit import build_vit_backbone
from segtrain.models.backbones.wide_resnet import build_wide_resnet

__all__ = ["BACKBONES", "build_backbone"]

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "df": build_df,
    "resnet": build_resnet,
    "timm": build_timm,
    "vit": build_vit_backbone,
    "wide_resnet38": build_wide_resnet,
}


def build_backbone(config: BackboneConfig, *, image_size: tuple[int, int]) -> nn.Module:
    """Build a backbone with random weights; no file is read.

    Args:
        config: The section `model.backbone`.
        image_size: (H, W) of a training crop.

    Returns:
        A module from images [B, 3, H, W] to a dict of maps, with `maps` (`models.maps.Maps`: the
        same names, shallow to deep) and `normalisation`; where it has tables or tokens,
        `no_weight_decay()`; where the sides of images must be multiples of something, `multiple`.

    Raises:
        UserError: If the configuration contradicts itself, or timm is missing.
    """
    return BACKBONES[config.name](config, image_size=image_size)
