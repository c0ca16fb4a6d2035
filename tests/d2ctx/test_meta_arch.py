"""The auxiliary loss reaches the loss dict of every meta-architecture, and only there."""

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.utils.events import EventStorage

from d2ctx import UserError, meta_arch, register
from d2ctx.trainer import Trainer
from tests.d2ctx import tiny

DETECTORS = ["ContextRCNN", "ContextPanopticFPN", "ContextRetinaNet", "ContextProposalNetwork"]
OPTS = {
    "ContextPanopticFPN": [
        "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p2", "p3", "p4", "p5"],
        "MODEL.SEM_SEG_HEAD.NORM", "",
        "MODEL.SEM_SEG_HEAD.CONVS_DIM", 8,
    ],
    "ContextRetinaNet": [
        "MODEL.RETINANET.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"],
        "MODEL.RETINANET.NUM_CLASSES", 6,
    ],
}  # fmt: skip
OPTS["ContextSemanticSegmentor"] = OPTS["ContextPanopticFPN"]


def losses(name: str, *opts: object) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    cfg = tiny.config(
        "a2fpn/mask_rcnn_a2fpn_instant.yaml",
        *("MODEL.META_ARCHITECTURE", name, *OPTS.get(name, []), *opts),
    )
    with EventStorage():
        return build_model(cfg).train()(tiny.batch())


@pytest.mark.parametrize("name", meta_arch.__all__)
def test_orthogonal_loss_is_in_the_loss_dict(name):
    # a large weight shows that the value is weighted; the initial weights are orthonormal
    found = losses(name, "MODEL.A2FPN.ORTHO_WEIGHT", 1e3)
    assert 0 <= found["loss_orthogonal"] < 1.0
    assert len(found) > 1


def test_no_orthogonal_loss_when_switched_off():
    assert "loss_orthogonal" not in losses("ContextRCNN", "MODEL.A2FPN.ORTHO_WEIGHT", 0.0)


def test_cascade_has_it_too():
    found = losses(
        "ContextRCNN", "MODEL.ROI_HEADS.NAME", "CascadeROIHeads",
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True,
    )  # fmt: skip
    assert {"loss_orthogonal", "loss_cls_stage2", "loss_mask"} <= set(found)


def test_a_plain_fpn_model_is_unchanged():
    found = losses("ContextRCNN", "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone")
    expected = losses("GeneralizedRCNN", "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone")
    assert {k: v.item() for k, v in found.items()} == {k: v.item() for k, v in expected.items()}


def test_a_meta_architecture_that_would_drop_the_loss_is_refused():
    cfg = tiny.config(
        "a2fpn/mask_rcnn_a2fpn_instant.yaml", "MODEL.META_ARCHITECTURE", "GeneralizedRCNN"
    )
    with pytest.raises(UserError, match=r"would drop.*loss_orthogonal.*use ContextRCNN"):
        Trainer.build_model(cfg)


def test_registering_twice_changes_nothing():
    before = META_ARCH_REGISTRY.get("ContextRCNN")
    register()
    assert META_ARCH_REGISTRY.get("ContextRCNN") is before


def test_one_step_gives_every_trainable_parameter_a_gradient():
    torch.manual_seed(0)
    model = build_model(tiny.config("a2fpn/mask_rcnn_a2fpn_instant.yaml")).train()
    with EventStorage():
        sum(model(tiny.batch()).values()).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
