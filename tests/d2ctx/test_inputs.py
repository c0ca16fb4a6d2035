"""Every system with inputs at the edge: one class, images of several odd sizes."""

import pytest
import torch
from detectron2.modeling import build_model

from tests.d2ctx import tiny
from tests.d2ctx.context_parts import FEW, detections, idle, mixed_sizes, step

SYSTEMS = {
    "mask_rcnn_a2fpn": ("a2fpn/mask_rcnn_a2fpn_instant.yaml",),
    "mask_rcnn_fpt": ("fpt/mask_rcnn_fpt_instant.yaml",),
    "mask_rcnn_fpt_ah": ("fpt/mask_rcnn_fpt_ah_instant.yaml",),
    "cascade_a2fpn": ("a2fpn/cascade_mask_rcnn_a2fpn_instant.yaml",),
    "htc_a2fpn": ("a2fpn/htc_a2fpn_instant.yaml",),
    "panoptic_a2fpn_lite": ("panoptic/panoptic_fpn_a2fpn_lite_instant.yaml",),
    "panoptic_fpt": ("panoptic/panoptic_fpn_fpt_instant.yaml",),
    # Its norm waits one step for the rest of the module, see test_sr.py.
    "panoptic_sr": ("panoptic/panoptic_fpn_fpn_sr_instant.yaml", "MODEL.SR.ZERO_INIT", False),
}


def model(system: str, *opts: object) -> torch.nn.Module:
    name, *more = SYSTEMS[system]
    torch.manual_seed(0)
    return build_model(tiny.config(name, *FEW, *more, *opts)).train()


@pytest.mark.parametrize("system", SYSTEMS)
def test_one_class_is_enough(system):
    built, inputs = model(system, "MODEL.ROI_HEADS.NUM_CLASSES", 1), tiny.batch()
    for image in inputs:
        image["instances"].gt_classes.zero_()
    assert all(loss.isfinite() for loss in step(built, inputs).values())
    assert not idle(built)
    found = detections(built, inputs)[0]["instances"]
    assert found.pred_masks.shape == (len(found), 96, 128)
    assert not found.pred_classes.any()


@pytest.mark.parametrize("system", SYSTEMS)
def test_images_of_several_odd_sizes(system):
    built, inputs = model(system), mixed_sizes()
    assert all(loss.isfinite() for loss in step(built, inputs).values())
    for image, found in zip(inputs, detections(built, inputs), strict=True):
        size = tuple(image["image"].shape[1:])
        assert found["instances"].image_size == size
        if system.startswith("panoptic"):
            assert tuple(found["sem_seg"].shape[1:]) == size
            assert tuple(found["panoptic_seg"][0].shape) == size
