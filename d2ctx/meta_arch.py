"""Detectron2's meta-architectures with the backbone's auxiliary losses in their loss dict.

Detectron2's own classes sum only what their heads report. Each class here is the parent plus
`AuxLossMixin`; with a backbone that has no auxiliary losses it behaves exactly like its parent.
"""

from typing import Any

from detectron2.modeling import (
    GeneralizedRCNN,
    PanopticFPN,
    ProposalNetwork,
    RetinaNet,
    SemanticSegmentor,
)

__all__ = [
    "ContextPanopticFPN",
    "ContextProposalNetwork",
    "ContextRCNN",
    "ContextRetinaNet",
    "ContextSemanticSegmentor",
]


class AuxLossMixin:
    """Adds `self.backbone.aux_losses()` to the losses that the parent's forward returns."""

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Run the parent; in training, add the backbone's auxiliary losses.

        Args:
            batched_inputs: Detectron2's list of one dict per image.

        Returns:
            In training, loss name -> scalar; otherwise what the parent returns.
        """
        output = super().forward(batched_inputs)
        if self.training and hasattr(self.backbone, "aux_losses"):
            output.update(self.backbone.aux_losses())
        return output


class ContextRCNN(AuxLossMixin, GeneralizedRCNN):
    """Faster, Mask and Cascade R-CNN with auxiliary backbone losses."""


class ContextPanopticFPN(AuxLossMixin, PanopticFPN):
    """Panoptic FPN with auxiliary backbone losses."""


class ContextProposalNetwork(AuxLossMixin, ProposalNetwork):
    """RPN alone with auxiliary backbone losses."""


class ContextRetinaNet(AuxLossMixin, RetinaNet):
    """RetinaNet with auxiliary backbone losses."""


class ContextSemanticSegmentor(AuxLossMixin, SemanticSegmentor):
    """Semantic FPN with auxiliary backbone losses."""
