"""FPT as a Detectron2 backbone: the translation from configuration to keywords.

Letters: B batch, C pyramid width, C_l channels of backbone level l, H_l W_l map, L levels.
"""

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ctxops import A2FPN, build_a2fpn
from ctxops.fpt import FeaturePyramidTransformer, build_fpt
from d2ctx.backbone import PyramidBackbone
from d2ctx.bottom_up import build_pyramid
from d2ctx.errors import UserError
from d2ctx.norm import usable_norm
from d2ctx.wording import did_you_mean

BASES = ("bfp", "fpn")
SCALES = ("sqrt", "none")
_SAME_NAME = (
    "CHANNELS TRANSFORMERS PAIRS ST_PARTS GT_PARTS ST_SIMILARITY GT_SIMILARITY PI_FROM SHARE_QK "
    "ATTN_DROPOUT LOCAL_SIZE RT_GATE GT_ZERO_GAMMA DROPBLOCK_SIZE DROPBLOCK_PROB DROPBLOCK_RAMP "
    "IMPL"
).split()


class StackedPyramid(nn.Module):
    """FPT on the levels of a complete FPN (`base="fpn"`), instead of on 1x1 projections.

    Args:
        fpn: L maps of C_l channels -> L + 1 maps of width C; the extra one is not used.
        fpt: L maps of width C -> L + 1 maps.
    """

    def __init__(self, *, fpn: A2FPN, fpt: FeaturePyramidTransformer) -> None:
        super().__init__()
        self.fpn = fpn
        self.fpt = fpt

    @property
    def size_ratio(self) -> int:
        """By how many finest-level cells an input must be divisible."""
        return max(self.fpn.size_ratio, self.fpt.size_ratio)

    def aux_losses(self) -> dict[str, Tensor]:
        """Weighted losses of both, in training."""
        return self.fpn.aux_losses() | self.fpt.aux_losses()

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Run both.

        Args:
            features: L maps [B, C_l, H_l, W_l], fine to coarse.

        Returns:
            L + 1 maps [B, C, H_l, W_l].
        """
        return self.fpt(self.fpn(features)[: len(features)])


def fpt_keywords(cfg: CfgNode) -> dict[str, Any]:
    """Keywords of `ctxops.fpt.build_fpt` that `cfg.MODEL.FPT` stands for.

    Args:
        cfg: Configuration after `add_d2ctx_config`.

    Returns:
        Keyword -> value, all but `in_channels` and `lateral`, which BASE decides.

    Raises:
        UserError: If SCALE is neither a name nor a number.
    """
    node = cfg.MODEL.FPT
    keywords = {key.lower(): node[key] for key in _SAME_NAME}
    pools = list(node.KV_POOL)
    keywords["kv_pool"] = pools[0] if len(pools) == 1 else pools
    keywords["inner_channels"] = node.INNER_CHANNELS or None
    keywords["scale"] = _scale(node.SCALE)
    keywords["norm"] = usable_norm(cfg, node.NORM, key="FPT.NORM")
    keywords["lateral_norm"] = usable_norm(cfg, node.LATERAL_NORM, key="FPT.LATERAL_NORM")
    return keywords | {"extra_level": True}


def _scale(text: str) -> str | float:
    if text in SCALES:
        return text
    try:
        return float(text)
    except ValueError as error:
        raise UserError(
            f"MODEL.FPT.SCALE must be sqrt, none or a number, got {text!r}; "
            f"{did_you_mean(text, SCALES)}"
        ) from error


def build_fpt_neck(*, in_channels: Sequence[int], base: str = "bfp", **keywords: Any) -> nn.Module:
    """FPT with the pyramid below it.

    Args:
        in_channels: C_l per level, fine to coarse.
        base: `bfp` (1x1 convolutions, the paper's) or `fpn` (a complete FPN).
        keywords: Those of `ctxops.fpt.build_fpt`.

    Returns:
        A neck for `PyramidBackbone`.

    Raises:
        ValueError: If `base` is unknown, or FPT cannot be built.
    """
    if base not in BASES:
        raise ValueError(f"base: there is no {base!r}; {did_you_mean(base, BASES)}")
    if base == "bfp":
        return build_fpt(in_channels=in_channels, **keywords)
    width = keywords.get("channels", 256)
    fpn = build_a2fpn(
        in_channels=in_channels,
        out_channels=width,
        lateral="conv",
        top_down="nearest",
        bottom_up="none",
        extra_level="maxpool",
    )
    fpt = build_fpt(in_channels=[width] * len(in_channels), lateral="none", **keywords)
    return StackedPyramid(fpn=fpn, fpt=fpt)


def build_resnet_fpt_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> PyramidBackbone:
    """ResNet or ResNeXt (`MODEL.RESNETS`, `MODEL.CONTEXT_BLOCK`) with FPT (`MODEL.FPT`).

    Args:
        cfg: Configuration after `add_d2ctx_config`.
        input_shape: Channels of the input image.

    Returns:
        A backbone with maps p2 to p6.

    Raises:
        UserError: If `MODEL.FPT` holds a value that the neck cannot be built with.
    """
    node, keywords = cfg.MODEL.FPT, fpt_keywords(cfg)

    def make_neck(in_channels: list[int]) -> nn.Module:
        return build_fpt_neck(in_channels=in_channels, base=node.BASE.lower(), **keywords)

    return build_pyramid(cfg, input_shape, make_neck, section="FPT", out_channels=node.CHANNELS)
