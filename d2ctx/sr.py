"""Squeeze Reasoning in a ResNet: the translation from `MODEL.SR` to keywords."""

from typing import Any

from detectron2.config import CfgNode

from ctxops.sr import SqueezeReasoning
from d2ctx.norm import usable_norm

_SAME_NAME = "REDUCTION NODES SQUEEZE POOL REASON ADJ WR NODE_NORM SA_SOFTMAX ZERO_INIT".split()


def sr_keywords(cfg: CfgNode) -> dict[str, Any]:
    """Keywords of `ctxops.sr.SqueezeReasoning` that `cfg.MODEL.SR` stands for.

    Args:
        cfg: Configuration after `add_d2ctx_config`.

    Returns:
        Keyword -> value, all but `in_channels`.
    """
    node = cfg.MODEL.SR
    keywords = {key.lower(): node[key] for key in _SAME_NAME}
    keywords["norm"] = usable_norm(cfg, node.NORM, key="SR.NORM")
    return keywords


def build_sr(cfg: CfgNode, channels: int) -> SqueezeReasoning:
    """Build one module.

    Args:
        cfg: Configuration after `add_d2ctx_config`.
        channels: C of the map that it stands on.

    Returns:
        The module.

    Raises:
        ValueError: If the values do not describe one, as nodes that do not divide the channels.
    """
    return SqueezeReasoning(in_channels=channels, **sr_keywords(cfg))
