"""Forward and backward passes of an update, in the loop and when one is looked at again."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ctxops.finite import FiniteWatch
from segtrain.criterion import LABELS, build_criterion, count_pixels
from segtrain.train.feed import Batch
from segtrain.train.state import TrainingState, precision

if TYPE_CHECKING:
    from segtrain.config.schema import RunConfig


class Passes:
    """What a micro batch goes through.

    Args:
        config: Of the run.
        device: Of the model.
        micro: Images of a micro batch.
    """

    def __init__(self, config: "RunConfig", device: torch.device, *, micro: int) -> None:
        self.options, self.device = config.train, device
        self.criterion = build_criterion(config.loss, share=micro / config.train.global_batch)

    def counts(self, parts: Sequence[Batch]) -> dict[str, Tensor]:
        """What the losses are divided by; a call of all processes.

        Args:
            parts: Micro batches of this process.

        Returns:
            As `count_pixels`, on the device.
        """
        return {k: v.to(self.device) for k, v in count_pixels(parts).items()}

    def gradients(
        self, state: TrainingState, parts: Sequence[Batch], counts: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Add up the gradients of an update.

        Args:
            state: In training.
            parts: Micro batches of this process.
            counts: From `counts`.

        Returns:
            This process's part of every loss.
        """
        losses: dict[str, Tensor] = {}
        for part in parts:
            with state.gradients_stay_here(part is not parts[-1]):
                terms = self.terms(state.forward, part, counts)
                state.scaler.scale(torch.stack(list(terms.values())).sum()).backward()
            for name, term in terms.items():
                losses[name] = losses.get(name, 0.0) + term.detach()
        return losses

    def terms(
        self, forward: nn.Module, part: Batch, counts: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The losses of one micro batch.

        Args:
            forward: The model, in training mode.
            part: From the loader.
            counts: From `counts`.

        Returns:
            Scalars, whose sum is what to differentiate.
        """
        images, labels = self.on_device(part)
        with precision(self.options, self.device):
            return self.criterion(forward(images), labels, counts)

    def on_device(self, part: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Move a micro batch to the model.

        Args:
            part: From the loader.

        Returns:
            Images [B, 3, H, W] and labels [B, H, W] by name.
        """
        layout = torch.channels_last if self.options.channels_last else torch.contiguous_format
        images = part["image"].to(self.device, non_blocking=True, memory_format=layout)
        names = [name for name in LABELS if name in part]
        return images, {name: part[name].to(self.device, non_blocking=True) for name in names}

    def looked_at(
        self, model: nn.Module, parts: Sequence[Batch], counts: Mapping[str, Tensor]
    ) -> tuple[FiniteWatch, dict[str, list[float]]]:
        """Make the passes under a watch; gradients are thrown away, nothing is scaled.

        Args:
            model: The plain module, in training mode.
            parts: Micro batches.
            counts: From `counts`.

        Returns:
            What was seen, and every loss of every pass.
        """
        losses: dict[str, list[float]] = {}
        with FiniteWatch(model) as watch:
            for part in parts:
                terms = self.terms(model, part, counts)
                torch.stack(list(terms.values())).sum().backward()
                for name, term in terms.items():
                    losses.setdefault(name, []).append(term.item())
        model.zero_grad(set_to_none=True)
        return watch, losses


def clip_gradients(state: TrainingState, clip_norm: float | None) -> Tensor:
    """Clip the gradients, where that is asked for.

    Args:
        state: With the gradients of an update.
        clip_norm: Largest norm of all of them together; None does not clip.

    Returns:
        Their norm before, a scalar; over all processes.
    """
    state.scaler.unscale_(state.optimizer)
    parameters = [p for p in state.model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of a sharded model
    if clip_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return whole
