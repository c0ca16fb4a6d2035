"""Detectron2's default trainer with our evaluators, weight checks and whole-model clipping."""

import logging
import weakref
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import build_model
from torch import nn

from d2ctx.errors import UserError
from d2ctx.evaluation.build import build_evaluator
from d2ctx.meta_arch import AuxLossMixin
from d2ctx.optimizer import build_optimizer
from d2ctx.weights import SafeCheckpointer

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """`DefaultTrainer` as our configurations need it.

    * Evaluators come from each data set's metadata.
    * Initial weights are loaded safely and must fit (`MODEL.WEIGHTS_MIN_MATCH`).
    * `SOLVER.CLIP_GRADIENTS.CLIP_TYPE: full_model` clips the norm over all parameters.
    * Checkpoints hold the optimizer, also under Detectron2 0.5.
    * A backbone with auxiliary losses is refused where they would be lost.
    """

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build the model and log one line about it."""
        model = build_model(cfg)
        check_aux_losses(model)
        params = sum(p.numel() for p in model.parameters() if p.requires_grad)
        logger.info("%s, %.3f M trainable parameters", type(model).__name__, params / 1e6)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer of `d2ctx.optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """Choose by metadata, see `d2ctx.build_evaluator`."""
        return build_evaluator(cfg, dataset_name)

    @property
    def last_results(self) -> dict[str, Any]:
        """Results of the last evaluation; empty before the first and off the main process."""
        return getattr(self, "_last_eval_results", None) or {}

    def resume_or_load(self, resume: bool = True) -> None:
        """Continue from the output folder's last checkpoint, or load `MODEL.WEIGHTS`.

        Args:
            resume: Whether a checkpoint in `OUTPUT_DIR` takes precedence.

        Raises:
            UserError: If the weight file is unsafe, missing or of another architecture.
        """
        loader = SafeCheckpointer(
            self.model,
            self.cfg.OUTPUT_DIR,
            min_match=self.cfg.MODEL.WEIGHTS_MIN_MATCH,
            trainer=weakref.proxy(self),
        )
        loader.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if resume and loader.has_checkpoint():
            self.start_iter = self.iter + 1

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds besides the model; Detectron2 0.5 leaves the optimizer out."""
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            UserError: If the optimizer is not in it.
        """
        if "_trainer" not in state_dict:
            raise UserError(
                "the last checkpoint holds no state of the optimizer (Detectron2 0.5 writes none): "
                "training cannot continue from it; start without --resume and give it as "
                "MODEL.WEIGHTS"
            )
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])


def check_aux_losses(model: nn.Module) -> None:
    """Refuse a model whose meta-architecture would drop its backbone's auxiliary losses.

    Raises:
        UserError: Naming the meta-architecture to use instead.
    """
    wanted = getattr(getattr(model, "backbone", None), "aux_losses", dict)
    if isinstance(model, AuxLossMixin) or not wanted():
        return
    name = type(model).__name__
    ours = {"GeneralizedRCNN": "ContextRCNN"}.get(name, f"Context{name}")
    raise UserError(
        f"MODEL.META_ARCHITECTURE {name} would drop the auxiliary losses {sorted(wanted())} of "
        f"the backbone; use {ours}, or set MODEL.A2FPN.ORTHO_WEIGHT 0"
    )
