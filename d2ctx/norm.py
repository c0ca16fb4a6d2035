"""Which norm a part gets on this machine."""

import logging

from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.logger import log_first_n


def usable_norm(cfg: CfgNode, norm: str, *, key: str) -> str:
    """The norm asked for; BN, told once, for a SyncBN that has nothing to synchronise with.

    SyncBN computes on GPUs only, and in one process it is BN. Both have the same state.

    Args:
        cfg: Configuration; only `MODEL.DEVICE` is read.
        norm: A norm's name, as in `ctxops.norm.make_norm`.
        key: The key below MODEL that asks for it.

    Returns:
        `norm`, or "BN".
    """
    if norm != "SyncBN" or (cfg.MODEL.DEVICE.startswith("cuda") and comm.get_world_size() > 1):
        return norm
    log_first_n(
        logging.INFO,
        f"MODEL.{key} SyncBN needs several processes with a GPU each: BN is used instead",
        name=__name__,
        key="message",
    )
    return "BN"
