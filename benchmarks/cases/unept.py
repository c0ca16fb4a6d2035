"""Training steps of UN-EPT at the paper's crop, by the attention among its queries."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases.case import MEMORY, Case
from benchmarks.rows import Target
from segtrain.config.load import load_config
from segtrain.criterion import LABELS, build_criterion, count_pixels
from segtrain.data.boundary import BoundaryLabels
from segtrain.models import build_model

SIDE, CLASSES = 480, 150
RUNS = str(Path(__file__).parents[2] / "configs/seg/unept/ade20k_unept_{}.yaml")
FULL = "full attention"


class Step(nn.Module):
    """Image to loss, the labels being fixed blocks of 60 pixels.

    Args:
        run: File of the run.
        **head: Keys of its head.
    """

    def __init__(self, run: str, **head: Any) -> None:
        super().__init__()
        config = load_config(run, [f"model.head.{key}={value}" for key, value in head.items()])
        self.model = build_model(config.model, CLASSES, image_size=(SIDE, SIDE)).train()
        self.criterion = build_criterion(config.loss)
        blocks = torch.arange(64, device="cpu").view(8, 8)
        label = blocks.repeat_interleave(60, 0).repeat_interleave(60, 1)
        more = BoundaryLabels(max_distance=5, min_area=100)(label)
        for name, value in ({"label": label} | more).items():
            self.register_buffer(name, value[None])

    def forward(self, image: Tensor) -> Tensor:
        """[1, 3, 480, 480] -> scalar."""
        labels = {name: self.get_buffer(name) for name in LABELS}
        counts = {name: count.to(image.device) for name, count in count_pixels([labels]).items()}
        return torch.stack(list(self.criterion(self.model(image), labels, counts).values())).sum()


def _image() -> Sequence[Tensor]:
    return [torch.randn(1, 3, SIDE, SIDE)]


def _case(name: str, backbone: str) -> Case:
    step = partial(Step, RUNS.format(backbone))
    return Case(
        name=f"UN-EPT, {name}, training step, {SIDE}x{SIDE}",
        make=_image,
        forms={
            FULL: partial(step, self_attention="full"),
            # Without dropout PyTorch's attention keeps no weights.
            "full attention, no dropout": partial(step, self_attention="full", dropout=0.0),
            "deformable": step,
        },
        baseline=FULL,
        targets={"deformable": {MEMORY: Target(of="ratio", limit=0.5)}},
        once=True,
    )


CASES = [_case("DeiT-B", "deit_b16"), _case("ResNet-50", "r50")]
