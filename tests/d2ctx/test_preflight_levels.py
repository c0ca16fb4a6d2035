"""A part that asks for a map which the part below it lacks is one line, before anything starts."""

import pytest
import torch
from detectron2.config import CfgNode

from d2ctx import UserError
from d2ctx.preflight import check_levels
from tests.d2ctx import tiny

A2FPN = "build_resnet_a2fpn_backbone gives ['p2', 'p3', 'p4', 'p5', 'p6']; name some of these"
STAGES = "MODEL.RESNETS.OUT_FEATURES gives ['res2', 'res3', 'res4', 'res5']; name some of these"
PANOPTIC = ("MODEL.META_ARCHITECTURE", "ContextPanopticFPN")
RETINANET = ("MODEL.META_ARCHITECTURE", "ContextRetinaNet")
CASCADE = (
    *("MODEL.ROI_HEADS.NAME", "ContextCascadeROIHeads"),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
)


def config(*opts: object) -> CfgNode:
    return tiny.config("a2fpn/mask_rcnn_a2fpn_instant.yaml", *opts)


def on(backbone: str) -> tuple[str, str]:
    return "MODEL.BACKBONE.NAME", f"build_{backbone}_backbone"


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (
            ("MODEL.RPN.IN_FEATURES", ["p2", "p7"]),
            f"MODEL.RPN.IN_FEATURES names ['p7'], but {A2FPN}",
        ),
        (
            ("MODEL.ROI_HEADS.IN_FEATURES", ["p9"]),
            f"ROI_HEADS.IN_FEATURES names ['p9'], but {A2FPN}",
        ),
        ((*CASCADE, "MODEL.ROI_HEADS.IN_FEATURES", ["res4"]), f"names ['res4'], but {A2FPN}"),
        ((*PANOPTIC, "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p1"]), f"names ['p1'], but {A2FPN}"),
        ((*RETINANET, "MODEL.RETINANET.IN_FEATURES", ["p7"]), f"names ['p7'], but {A2FPN}"),
        (
            ("MODEL.A2FPN.IN_FEATURES", ["res3", "res4", "res5"]),
            "MODEL.A2FPN: num_contexts: expected 3 numbers",
        ),
        (
            ("MODEL.A2FPN.IN_FEATURES", ["res3", "res4"], "MODEL.A2FPN.NUM_CONTEXTS", [8, 4]),
            "MODEL.RPN.IN_FEATURES names ['p2', 'p6'], but build_resnet_a2fpn_backbone gives "
            "['p3', 'p4', 'p5']; name some of these",
        ),
        (
            ("MODEL.A2FPN.IN_FEATURES", ["res2", "res4"], "MODEL.A2FPN.NUM_CONTEXTS", [8, 4]),
            "MODEL.A2FPN: IN_FEATURES must be fine to coarse with doubling strides",
        ),
        (
            (*on("resnet_fpt"), "MODEL.FPT.IN_FEATURES", ["res2", "res6"]),
            f"MODEL.FPT.IN_FEATURES names ['res6'], but {STAGES}",
        ),
        (
            (*on("sr_resnet_fpn"), "MODEL.FPN.IN_FEATURES", ["res6"]),
            f"MODEL.FPN.IN_FEATURES names ['res6'], but {STAGES}",
        ),
        (
            (*on("resnet_fpn"), "MODEL.FPN.IN_FEATURES", ["res6"]),
            f"MODEL.FPN.IN_FEATURES names ['res6'], but {STAGES}",
        ),
        (
            ("MODEL.RESNETS.OUT_FEATURES", ["res4", "res7"]),
            "MODEL.RESNETS.OUT_FEATURES names ['res7'], but a ResNet gives ['stem', 'res2', "
            "'res3', 'res4', 'res5']",
        ),
        (
            ("MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16]]),
            "MODEL.ANCHOR_GENERATOR.SIZES has 2 lists, but MODEL.RPN.IN_FEATURES names 5 maps; "
            "give one list for each, or one for all",
        ),
        (
            ("MODEL.RESNETS.DEPTH", 51),
            "build_resnet_a2fpn_backbone cannot be built, KeyError: 51; look for this value in "
            "MODEL.BACKBONE, MODEL.RESNETS",
        ),
    ],
)
def test_what_is_absent_is_named_with_what_there_is(opts, message):
    with pytest.raises(UserError) as caught:
        check_levels(config(*opts))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "opts",
    [
        (),
        PANOPTIC,
        (*RETINANET, "MODEL.RETINANET.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]),
        ("MODEL.ANCHOR_GENERATOR.SIZES", [[8, 16]]),
        ("MODEL.ANCHOR_GENERATOR.SIZES", [8, 16]),
        # Nobody reads these.
        ("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p9"]),
        ("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals", "MODEL.RPN.IN_FEATURES", ["p9"]),
    ],
)
def test_models_that_can_be_built_pass(opts):
    state = torch.get_rng_state()
    check_levels(config(*opts))
    assert torch.equal(torch.get_rng_state(), state)
