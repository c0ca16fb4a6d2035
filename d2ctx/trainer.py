"""Detectron2's default trainer with our evaluators, weight checks, clipping and recovery."""

import errno
import logging
import weakref
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from d2ctx.errors import Interrupted, UserError
from d2ctx.evaluation.build import build_evaluator
from d2ctx.files import remove_partials
from d2ctx.meta_arch import AuxLossMixin
from d2ctx.optimizer import build_optimizer
from d2ctx.recovery.blackbox import FOLDER
from d2ctx.recovery.checkpoints import FINAL, set_aside
from d2ctx.recovery.hooks import Checkpoints
from d2ctx.recovery.journal import Journal
from d2ctx.recovery.nonfinite import Policy
from d2ctx.recovery.rng import generators_kept, set_generator_state
from d2ctx.recovery.signals import StopRequest
from d2ctx.recovery.stream import ExactLoader, build_exact_loader
from d2ctx.recovery.updates import GuardedTrainer
from d2ctx.weights import SafeCheckpointer

logger = logging.getLogger(__name__)
# Hooks whose work is there after the run.
_LASTING = (Checkpoints, hooks.EvalHook, hooks.PeriodicWriter)
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


class Trainer(DefaultTrainer):
    """`DefaultTrainer` as our configurations need it.

    * Evaluators come from each data set's metadata.
    * Initial weights are loaded safely and must fit (`MODEL.WEIGHTS_MIN_MATCH`).
    * `SOLVER.CLIP_GRADIENTS.CLIP_TYPE: full_model` clips the norm over all parameters.
    * A backbone with auxiliary losses is refused where they would be lost.
    * It can be stopped by a signal and killed, and goes on exactly: see docs/d2_training.md.
    * An update that is not finite is dropped, recorded and dealt with (`SOLVER.ON_NONFINITE`).

    Args:
        cfg: The run's configuration.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.stop, self.policy = StopRequest(), Policy(cfg.SOLVER.ON_NONFINITE)
        self.checkpoints = Checkpoints(cfg.SOLVER.CHECKPOINT_PERIOD)
        self.rewinds, self._generators = 0, []
        self._final_due = False
        self.journal = Journal(Path(cfg.OUTPUT_DIR))
        super().__init__(cfg)
        plain = self._trainer
        self._trainer = self.updates = GuardedTrainer(
            plain.model,
            plain.data_loader,
            plain.optimizer,
            amp=cfg.SOLVER.AMP.ENABLED,
            asked=self.stop.__bool__,
        )
        self.checkpointer = SafeCheckpointer(
            plain.model,
            cfg.OUTPUT_DIR,
            min_match=cfg.MODEL.WEIGHTS_MIN_MATCH,
            trainer=weakref.proxy(self),
        )

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

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Build a loader that can go on from any batch, Detectron2's own where that cannot be."""
        return build_exact_loader(cfg) or super().build_train_loader(cfg)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """Evaluate as Detectron2 does, without a trace in the random generators.

        Args:
            cfg: The configuration.
            model: What to evaluate.
            evaluators: One for each data set; None builds them.

        Returns:
            The results.
        """
        with generators_kept():
            return super().test(cfg, model, evaluators)

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's hooks, with our own for checkpoints and for evaluation."""
        ours: list[HookBase] = []
        for hook in super().build_hooks():
            if isinstance(hook, hooks.EvalHook):
                ours += [
                    self.checkpoints,
                    hooks.EvalHook(self.cfg.TEST.EVAL_PERIOD, self._evaluate),
                ]
            elif hook is not None and not isinstance(hook, hooks.PeriodicCheckpointer):
                ours.append(hook)
        return ours

    def resume_or_load(self, resume: bool = True) -> None:
        """Continue from the output folder's last checkpoint, or load `MODEL.WEIGHTS`.

        Args:
            resume: Whether a checkpoint in `OUTPUT_DIR` takes precedence.

        Raises:
            UserError: If the weight file is unsafe, missing or of another architecture.
        """
        resuming = resume and self.checkpointer.has_checkpoint()
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        comm.synchronize()
        if resuming:
            self.start_iter = self.iter + 1
            self._final_due = Path(self.checkpointer.path).stem != FINAL
        if not comm.is_main_process():
            return
        folder = Path(self.cfg.OUTPUT_DIR)
        for place in (folder, folder / FOLDER):
            remove_partials(place)
        if not resuming:
            set_aside(folder)
        self.journal.cut_back(self.start_iter)

    def train(self) -> dict[str, Any] | None:
        """Train to the end, or until a signal.

        Returns:
            Results of the last evaluation where `TEST.EXPECTED_RESULTS` asks for some.

        Raises:
            Interrupted: After a signal, the state being saved.
            UserError: If training cannot go on.
        """
        logger.info("Starting training from iteration %d", self.start_iter)
        self.iter = self.start_iter
        with self.stop, EventStorage(self.start_iter) as self.storage:
            try:
                self.before_train()
                self._restore_generators()
                self._loop()
                self.journal.flush()
                self.after_train()
            except BaseException as error:
                no_room = isinstance(error, OSError) and error.errno in _NO_ROOM
                self._close(error, tell=not no_room)
                if no_room:
                    raise UserError(
                        f"{self.cfg.OUTPUT_DIR} cannot be written ({error.strerror}); checkpoints "
                        "are intact: make room, then go on with the same command and --resume"
                    ) from error
                raise
        if self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
            verify_results(self.cfg, self._last_eval_results)
            return self._last_eval_results
        return None

    def repeat(self, updates: int) -> None:
        """Do the next updates for the journal alone: no checkpoint, evaluation or log comes of it.

        Args:
            updates: How many.
        """
        self._hooks = [hook for hook in self._hooks if not isinstance(hook, _LASTING)]
        self.max_iter = min(self.max_iter, self.start_iter + updates)
        self._final_due = False
        self.train()

    def _loop(self) -> None:
        if self._final_due and self.iter >= self.max_iter:
            # The run was killed between its last checkpoint and the final one, which are the same.
            self.iter -= 1
            self.checkpoints.save_final()
            self.iter += 1
        while self.iter < self.max_iter:
            rates = self.learning_rates()
            self.before_step()
            self.run_step()
            if not self._settle(rates):
                continue
            self.after_step()
            if self.updates.stopping:
                self.checkpoints.save()
                raise Interrupted(f"stopped by a signal, {self._how_to_go_on()}")
            self.iter += 1

    def _settle(self, rates: list[float]) -> bool:
        """Record the update, and do what is due where it was dropped; False: the run went back."""
        failure, iteration = self.updates.failure, self.iter
        if failure is None:
            self.policy.passed()
            self._write({"lr": rates, "losses": self.updates.losses})
            return True
        told = {"event": self.policy.name, "lr": rates, "losses": failure.values}
        self._write(told)
        if not self.policy.failed(self, failure):
            return True
        self._go_back()
        self._write({**told, "from": iteration})
        return False

    def _go_back(self) -> None:
        for hook in self._hooks:  # those that time a step must see its end
            if not isinstance(hook, (*_LASTING, hooks.PreciseBN)):
                hook.after_step()
        rewinds = self.rewinds + 1
        self.checkpointer.resume_or_load("", resume=True)
        self.rewinds, self.iter = rewinds, self.iter + 1
        if isinstance(self.data_loader, ExactLoader):
            self.data_loader.detours = rewinds
            self.updates.restart_data()
        self._restore_generators()
        if comm.is_main_process():
            self.journal.cut_back(self.iter)

    def _write(self, record: dict[str, Any]) -> None:
        if comm.is_main_process():
            self.journal.write({"iteration": self.iter, **record})

    def _evaluate(self) -> dict[str, Any]:
        """Evaluate; one process alone gives it up when a signal comes, several finish it."""
        alone = comm.get_world_size() == 1
        message = f"stopped by a signal while evaluating, {self._how_to_go_on()}"
        try:
            with self.stop.at_once(message) if alone else nullcontext():
                self._last_eval_results = self.test(self.cfg, self.model)
        except Interrupted:
            if self.iter < self.max_iter:
                self.checkpoints.save()
            raise
        return self._last_eval_results

    def _how_to_go_on(self) -> str:
        last = min(self.iter, self.max_iter - 1)
        return f"saved after iteration {last}; go on with the same command and --resume"

    def _close(self, error: BaseException, *, tell: bool) -> None:
        """Let the writers write what they have; a run that did not end is not evaluated."""
        if tell and not isinstance(error, UserError | Interrupted | KeyboardInterrupt):
            logger.error("training ended at iteration %d", self.iter, exc_info=error)
        self.storage.iter = self.iter
        closing = [h.after_train for h in self._hooks if not isinstance(h, hooks.EvalHook)]
        for close in (self.journal.flush, *closing):
            with suppress(Exception):  # it must not hide the first one
                close()

    def learning_rates(self) -> list[float]:
        """Those of the optimizer's groups, each once, in order."""
        return sorted({group["lr"] for group in self.optimizer.param_groups})

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds besides the model; Detectron2 0.5 leaves the optimizer out."""
        loader = self.data_loader
        recovery = {
            "generators": self.checkpoints.generators,
            "data": loader.state_dict() if isinstance(loader, ExactLoader) else None,
            "rewinds": self.rewinds,
        }
        return {
            **super().state_dict(),
            "_trainer": self._trainer.state_dict(),
            "recovery": recovery,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Args:
            state_dict: From a checkpoint.

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
        recovery = state_dict.get("recovery", {})
        self.rewinds = recovery.get("rewinds", 0)
        self._generators = recovery.get("generators", [])
        if isinstance(self.data_loader, ExactLoader) and recovery.get("data"):
            self.data_loader.load_state_dict(recovery["data"])
        else:
            logger.warning(
                "the order of the data is not restored: the checkpoint or the loader of the "
                "training data knows none; the run goes on with images in another order"
            )

    def _restore_generators(self) -> None:
        """Put this process's random generators where they were at the checkpoint."""
        states, rank = self._generators, comm.get_rank()
        if not states:
            return
        if len(states) == comm.get_world_size():
            set_generator_state(states[rank])
        else:
            logger.warning(
                "the checkpoint is of %d processes, these are %d: what the model draws at random "
                "(sampled regions, dropout) is not restored",
                len(states),
                comm.get_world_size(),
            )


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
