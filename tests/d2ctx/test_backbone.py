"""The A²-FPN backbone from YAML: shapes, divisibility, parts, and its baselines."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_resnet_backbone

from ctxops import build_a2fpn
from d2ctx import PyramidBackbone, UserError
from d2ctx.a2fpn import a2fpn_keywords
from tests.d2ctx import tiny

FULL, LITE = "a2fpn/mask_rcnn_a2fpn_instant.yaml", "a2fpn/mask_rcnn_a2fpn_lite_instant.yaml"
BASELINE = ["MODEL.A2FPN.LATERAL", "conv", "MODEL.A2FPN.TOP_DOWN", "nearest"]
BASELINE += ["MODEL.A2FPN.EXTRA_LEVEL", "maxpool"]


@pytest.mark.parametrize(("name", "divisor"), [(FULL, 64), (LITE, 32)])
def test_outputs_and_divisibility(name, divisor):
    backbone = build_backbone(tiny.config(name)).eval()
    assert backbone.size_divisibility == divisor
    assert list(backbone.output_shape()) == ["p2", "p3", "p4", "p5", "p6"]
    maps = backbone(torch.randn(1, 3, divisor, 2 * divisor))
    for level, (key, shape) in enumerate(backbone.output_shape().items(), start=2):
        assert shape.stride == 2**level
        size = (-(-divisor // shape.stride), -(-2 * divisor // shape.stride))
        assert maps[key].shape == (1, shape.channels, *size)


def test_yaml_and_keywords_build_the_same_neck():
    cfg = tiny.config(FULL)
    torch.manual_seed(0)
    from_yaml = build_backbone(cfg)
    torch.manual_seed(0)
    bottom_up = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    channels = [s.channels for s in bottom_up.output_shape().values()]
    direct = build_a2fpn(in_channels=channels, **a2fpn_keywords(cfg))
    for (name, a), (_, b) in zip(
        from_yaml.neck.state_dict().items(), direct.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name


def test_every_neck_key_reaches_the_neck():
    keywords = a2fpn_keywords(tiny.config(FULL, "MODEL.A2FPN.NUM_CONTEXTS", [1, 2, 3, 4]))
    assert keywords["num_contexts"] == [1, 2, 3, 4]
    node = tiny.config(FULL).MODEL.A2FPN
    assert set(keywords) == {key.lower() for key in node} - {"in_features"}


def test_plain_switches_equal_detectron2s_fpn():
    ours = build_backbone(
        tiny.config(
            FULL, *BASELINE, "MODEL.A2FPN.BOTTOM_UP", "none", "MODEL.A2FPN.OUT_CHANNELS", 64
        )
    ).eval()
    theirs = build_backbone(
        tiny.config(FULL, "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone")
    ).eval()
    theirs.bottom_up.load_state_dict(ours.bottom_up.state_dict())
    state = {}
    for level in range(2, 6):
        for kind in ("weight", "bias"):
            for theirs_name, name in (("lateral", "lateral"), ("output", "output_td")):
                value = ours.neck.state_dict()[f"{name}.p{level}.{kind}"]
                state[f"fpn_{theirs_name}{level}.{kind}"] = value
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.startswith("bottom_up") for key in missing)
    image = torch.randn(1, 3, 64, 96)
    for key, value in theirs(image).items():
        torch.testing.assert_close(ours(image)[key], value)


@pytest.mark.parametrize("depth", [50, 101])
def test_resnet_depths_and_resnext(depth):
    opts = ["MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.NUM_GROUPS", 4]
    backbone = build_backbone(tiny.config(FULL, *opts, "MODEL.RESNETS.WIDTH_PER_GROUP", 2))
    assert len(backbone.bottom_up.stages[2]) == {50: 6, 101: 23}[depth]
    assert backbone.bottom_up.stages[0][0].conv2.groups == 4


def test_strides_that_do_not_double_are_refused():
    cfg = tiny.config(FULL)
    bottom_up = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    neck = build_a2fpn(in_channels=[32, 128])
    with pytest.raises(ValueError, match="doubling strides"):
        PyramidBackbone(
            bottom_up=bottom_up,
            neck=neck,
            in_features=["res2", "res4"],
            out_channels=256,
            num_outputs=3,
        )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("GATE", "softmax", "MODEL.A2FPN: gate"),
        ("NUM_CONTEXTS", [8, 4], "MODEL.A2FPN: num_contexts: expected 4 numbers"),
        (
            "IN_FEATURES",
            ["res4", "res6"],
            r"names \['res6'\], but MODEL.RESNETS.OUT_FEATURES gives",
        ),
    ],
)
def test_values_that_no_neck_can_have_are_the_users_to_mend(key, value, message):
    with pytest.raises(UserError, match=message):
        build_backbone(tiny.config(FULL, f"MODEL.A2FPN.{key}", value))
