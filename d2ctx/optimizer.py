"""Optimizers: Detectron2's SGD, AdamW, and gradient clipping over the whole model."""

import torch
from detectron2 import solver
from detectron2.config import CfgNode
from torch import nn

from d2ctx.errors import UserError

OPTIMIZERS = ("SGD", "AdamW")
FULL_MODEL = "full_model"


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build `SOLVER.OPTIMIZER` with Detectron2's parameter groups.

    `SOLVER.CLIP_GRADIENTS.CLIP_TYPE: full_model` clips the norm over all parameters; Detectron2's
    own types clip parameter by parameter.

    Args:
        cfg: Configuration after `add_d2ctx_config`.
        model: What to train.

    Returns:
        The optimizer.

    Raises:
        UserError: If the name is unknown.
    """
    if cfg.SOLVER.OPTIMIZER not in OPTIMIZERS:
        raise UserError(
            f"SOLVER.OPTIMIZER must be one of {', '.join(OPTIMIZERS)}, got {cfg.SOLVER.OPTIMIZER!r}"
        )
    clip = cfg.SOLVER.CLIP_GRADIENTS
    clip_all = clip.ENABLED and clip.CLIP_TYPE == FULL_MODEL
    if clip_all:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
    build = _build_adamw if cfg.SOLVER.OPTIMIZER == "AdamW" else solver.build_optimizer
    optimizer = build(cfg, model)
    if clip_all:
        clip_full_model(optimizer, max_norm=clip.CLIP_VALUE, norm_type=clip.NORM_TYPE)
    return optimizer


def _build_adamw(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    groups = solver.get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
    )
    kind = solver.build.maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
    return kind(groups, cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)


def clip_full_model(
    optimizer: torch.optim.Optimizer, *, max_norm: float, norm_type: float = 2.0
) -> None:
    """Clip the gradient norm over all parameters before each step of `optimizer`.

    A gradient scaler has already unscaled the gradients when the optimizer steps, so the norm is
    the true one under mixed precision.

    Args:
        optimizer: The optimizer to change in place.
        max_norm: Largest allowed norm.
        norm_type: Which norm.
    """

    def clip(stepping: torch.optim.Optimizer, *_: object) -> None:
        parameters = [p for group in stepping.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)

    optimizer.register_step_pre_hook(clip)
