"""Configurations and steps for the tests of FPT, of context in ResNets and of PANet's heads."""

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from tests.d2ctx import tiny

PLAIN = "sr/mask_rcnn_fpn_sr_instant.yaml"  # with context "none": Detectron2's ResNet and FPN
FPT = "fpt/mask_rcnn_fpt_instant.yaml"
KINDS = ("nl", "gc", "aa", "sr")
FEW = (
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16, "MODEL.RPN.POST_NMS_TOPK_TEST", 20),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 30),
)


def context(kind: str) -> tuple[object, ...]:
    """Overrides that switch a kind on, in two stages."""
    stages = ["res4", "res5"]
    return (
        *("MODEL.CONTEXT_BLOCK.KIND", kind, "MODEL.CONTEXT_BLOCK.REDUCTION", 4),
        *("MODEL.CONTEXT_BLOCK.STAGES", stages, "MODEL.SR.STAGES", stages),
    )


def config(name: str, *opts: object) -> CfgNode:
    """An instant configuration with few regions."""
    return tiny.config(name, *FEW, *opts)


def model(name: str, *opts: object) -> nn.Module:
    """Built from a fixed seed, in training mode."""
    torch.manual_seed(0)
    return build_model(config(name, *opts)).train()


def losses(built: nn.Module, inputs: list[dict] | None = None) -> dict[str, Tensor]:
    """From a fixed seed, which decides what regions are sampled."""
    torch.manual_seed(1)
    with EventStorage():
        return built(tiny.batch() if inputs is None else inputs)


def step(built: nn.Module, inputs: list[dict] | None = None) -> dict[str, Tensor]:
    """Losses, and their gradients in the parameters."""
    found = losses(built, inputs)
    sum(found.values()).backward()
    return found


def idle(built: nn.Module) -> list[str]:
    """Trainable parameters that got no gradient."""
    return [n for n, p in built.named_parameters() if p.requires_grad and p.grad is None]


def mixed_sizes() -> list[dict]:
    """Images of two sizes, neither divisible by anything."""
    return tiny.batch(height=93, width=121, num_images=1) + tiny.batch(
        height=85, width=107, num_images=1
    )


def detections(built: nn.Module, inputs: list[dict]) -> list[dict]:
    """Of a model in evaluation mode."""
    with torch.no_grad():
        return built.eval()(inputs)
