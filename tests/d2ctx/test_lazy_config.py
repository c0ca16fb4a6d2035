"""Every backbone, head and system is built from keywords alone, hence by LazyConfig too."""

import pytest
import torch
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage

from tests.d2ctx import tiny
from tests.d2ctx.lazy_parts import BACKBONES, STRIDES, SYSTEMS, WIDTH


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_is_built_and_runs(name):
    backbone = instantiate(BACKBONES[name])
    height, width = 64, 128
    maps = backbone(torch.randn(1, 3, height, width))
    sizes = {n: (1, WIDTH, height // s, width // s) for n, s in STRIDES.items()}
    assert {n: tuple(x.shape) for n, x in maps.items()} == sizes
    assert {n: s.stride for n, s in backbone.output_shape().items()} == STRIDES


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_is_built_trains_a_step_and_detects(name):
    torch.manual_seed(0)
    model = instantiate(SYSTEMS[name]).train()
    inputs = tiny.batch(num_images=1)
    with EventStorage():
        losses = model(inputs)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    with torch.no_grad():
        (found,) = model.eval()(inputs)
    assert {"pred_boxes", "pred_masks"} <= set(found["instances"].get_fields())
    assert ("panoptic_seg" in found) == (name == "panoptic_fpn")


def test_a_description_can_be_changed_before_it_is_built():
    lazy = BACKBONES["a2fpn_lite"].copy()
    lazy.neck.reduction_channels = 4
    before, after = instantiate(BACKBONES["a2fpn_lite"]), instantiate(lazy)
    assert sum(p.numel() for p in after.parameters()) < sum(p.numel() for p in before.parameters())
