"""Squeeze reasoning from its section, for every head that has a place for it."""

from ctxops.sr import SqueezeReasoning
from segtrain.config.sr import ReasoningConfig


def build_reasoning(config: ReasoningConfig, channels: int) -> SqueezeReasoning:
    """Build squeeze reasoning.

    Args:
        config: The section.
        channels: Of the map.

    Returns:
        The module.

    Raises:
        ValueError: If widths do not divide, or keys contradict each other.
    """
    if config.preset == "released":
        return SqueezeReasoning.released(
            in_channels=channels, reduction=config.reduction, nodes=config.num_nodes
        )
    return SqueezeReasoning(
        in_channels=channels,
        reduction=config.reduction,
        nodes=config.num_nodes,
        squeeze=config.squeeze,
        pool=config.pool,
        reason=config.reason,
        adj=config.adj,
        wr=config.wr,
        norm=config.norm,
        node_norm=config.node_norm,
        sa_softmax=config.sa_softmax,
        zero_init=config.zero_init,
    )
