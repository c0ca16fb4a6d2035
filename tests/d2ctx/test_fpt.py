"""FPT as a backbone from YAML: keys, bases, recipes, steps, and what cannot be built."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, ResNet, build_backbone, build_resnet_backbone
from detectron2.modeling.backbone import BasicStem, BottleneckBlock

from ctxops.fpt import build_fpt
from d2ctx import PyramidBackbone, UserError
from d2ctx.compat import LastLevelMaxPool
from d2ctx.fpt import StackedPyramid, build_fpt_neck, fpt_keywords
from tests.d2ctx import tiny
from tests.d2ctx.context_parts import FPT, config, detections, idle, mixed_sizes, model, step

BOXES = "fpt/faster_rcnn_fpt_instant.yaml"
ROWS = [[], ["st"], ["gt"], ["rt"], ["st", "gt"], ["st", "rt"], ["gt", "rt"], ["st", "gt", "rt"]]
# Another value for every key, and the keyword that it must become.
CHANGED = {
    "CHANNELS": 64,
    "TRANSFORMERS": ["rt"],
    "PAIRS": "adjacent",
    "ST_PARTS": 4,
    "GT_PARTS": 2,
    "INNER_CHANNELS": 16,
    "ST_SIMILARITY": "euclidean",
    "GT_SIMILARITY": "dot",
    "SCALE": "none",
    "PI_FROM": "query",
    "SHARE_QK": True,
    "KV_POOL": [1, 2, 1, 1],
    "ATTN_DROPOUT": 0.1,
    "LOCAL_SIZE": 5,
    "RT_GATE": "sigmoid",
    "NORM": "BN",
    "LATERAL_NORM": "GN",
    "GT_ZERO_GAMMA": True,
    "DROPBLOCK_SIZE": 3,
    "DROPBLOCK_PROB": 0.2,
    "DROPBLOCK_RAMP": 100,
    "IMPL": "sdpa",
}


def backbone(*opts):
    torch.manual_seed(0)
    return build_backbone(config(FPT, *opts)).eval()


def image(height=64, width=96, num_images=1):
    return torch.randn(num_images, 3, height, width, generator=torch.Generator().manual_seed(2))


# ---- from YAML -------------------------------------------------------------------------------
@pytest.mark.parametrize("base", ["bfp", "fpn"])
def test_outputs_and_divisibility(base):
    built = backbone("MODEL.FPT.BASE", base)
    assert built.size_divisibility == 32
    maps = built(image(32, 64))
    assert list(maps) == list(built.output_shape()) == ["p2", "p3", "p4", "p5", "p6"]
    for level, (name, shape) in enumerate(built.output_shape().items(), start=2):
        assert (shape.stride, shape.channels) == (2**level, 32)
        assert maps[name].shape == (1, 32, -(-32 // shape.stride), 64 // shape.stride)


@pytest.mark.parametrize("key", CHANGED)
def test_every_key_reaches_the_neck(key):
    keywords = fpt_keywords(config(FPT, f"MODEL.FPT.{key}", CHANGED[key]))
    assert keywords[key.lower()] == CHANGED[key]


def test_every_key_is_tested():
    node = config(FPT).MODEL.FPT
    assert set(CHANGED) == set(node) - {"IN_FEATURES", "BASE"}
    assert {key for key in CHANGED if CHANGED[key] == node[key]} == set()


def test_defaults_are_those_of_the_builder():
    node = config("fpt/mask_rcnn_r50_fpt_1x.yaml").MODEL.FPT
    with torch.device("meta"):
        ours = build_fpt_neck(in_channels=[32] * 4, **fpt_keywords(config(FPT)) | {"channels": 256})
        theirs = build_fpt(in_channels=[32] * 4, extra_level=True)
    assert str(ours) == str(theirs)
    assert node.IMPL == "auto"


@pytest.mark.parametrize(("value", "expected"), [([2], 2), ([2, 1, 1, 1], [2, 1, 1, 1])])
def test_pooling_is_for_all_levels_or_one_per_level(value, expected):
    assert fpt_keywords(config(FPT, "MODEL.FPT.KV_POOL", value))["kv_pool"] == expected


@pytest.mark.parametrize(("text", "expected"), [("sqrt", "sqrt"), ("none", "none"), ("0.5", 0.5)])
def test_scale_is_a_name_or_a_number(text, expected):
    assert fpt_keywords(config(FPT, "MODEL.FPT.SCALE", f'"{text}"'))["scale"] == expected


def test_direct_construction_equals_yaml():
    built = backbone()
    widths = [(8, 8, 32), (32, 16, 64), (64, 32, 128), (128, 64, 256)]
    blocks = [
        ResNet.make_stage(
            BottleneckBlock,
            count,
            stride_per_block=[stride] + [1] * (count - 1),
            in_channels=first,
            bottleneck_channels=middle,
            out_channels=last,
            norm="BN",
        )
        for count, stride, (first, middle, last) in zip(
            (3, 4, 6, 3), (1, 2, 2, 2), widths, strict=True
        )
    ]
    names = ["res2", "res3", "res4", "res5"]
    direct = PyramidBackbone(
        bottom_up=ResNet(BasicStem(out_channels=8, norm="BN"), blocks, out_features=names),
        neck=build_fpt(in_channels=[32, 64, 128, 256], channels=32, extra_level=True),
        in_features=names,
        out_channels=32,
        num_outputs=5,
    ).eval()
    direct.load_state_dict(built.state_dict())
    torch.testing.assert_close(direct(image()), built(image()))


def test_on_a_complete_pyramid_it_is_fpn_then_fpt():
    built = backbone("MODEL.FPT.BASE", "fpn")
    assert isinstance(built.neck, StackedPyramid)
    cfg = config(FPT)
    theirs = FPN(
        build_resnet_backbone(cfg, ShapeSpec(channels=3)),
        ["res2", "res3", "res4", "res5"],
        32,
        top_block=LastLevelMaxPool(),
    ).eval()
    theirs.bottom_up.load_state_dict(built.bottom_up.state_dict())
    for level in range(2, 6):
        for ours, name in (("lateral", "lateral"), ("output_td", "output")):
            layer = getattr(built.neck.fpn, ours)
            part = dict(layer.named_children())[f"p{level}"]
            getattr(theirs, f"fpn_{name}{level}").load_state_dict(part.state_dict())
    maps = built.neck.fpt(list(theirs(image()).values())[:4])
    torch.testing.assert_close(list(built(image()).values()), maps)


# ---- steps -----------------------------------------------------------------------------------
@pytest.mark.parametrize("kinds", ROWS, ids=lambda kinds: "_".join(kinds) or "bfp")
def test_one_step_gives_every_trainable_parameter_a_gradient(kinds):
    built = model(FPT, "MODEL.FPT.TRANSFORMERS", kinds)
    found = step(built)
    assert all(loss.isfinite() for loss in found.values())
    assert not idle(built)
    names = {name.split(".")[2] for name, _ in built.named_parameters() if ".neck." in name}
    assert names == {*kinds, "lateral"} | ({"fuse"} if kinds else set())


def test_base_fpn_and_boxes_alone_train_too():
    built = model(BOXES, "MODEL.FPT.BASE", "fpn")
    assert "loss_mask" not in step(built)
    assert not idle(built)


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "GN", ""])
def test_norms_train_with_one_image(norm):
    built = model(FPT, "MODEL.FPT.NORM", norm)
    found = step(built, tiny.batch(num_images=1))
    assert all(loss.isfinite() for loss in found.values())
    assert not idle(built)


def test_a_frozen_backbone_leaves_the_neck_and_the_heads():
    built = model(FPT, "MODEL.BACKBONE.FREEZE_AT", 5)
    step(built)
    assert not any(p.requires_grad for p in built.backbone.bottom_up.parameters())
    assert all(p.requires_grad for p in built.backbone.neck.parameters())
    assert not idle(built)


def test_images_of_different_odd_sizes():
    built = model(FPT)
    assert all(loss.isfinite() for loss in step(built, mixed_sizes()).values())
    for given, found in zip(mixed_sizes(), detections(built, mixed_sizes()), strict=True):
        assert found["instances"].image_size == given["image"].shape[1:]


def test_an_image_does_not_depend_on_its_neighbours():
    # In float64: at toy width each channel is a group of GN, which magnifies rounding.
    built, images = backbone().double(), image(num_images=2).double()
    both = built(images)
    for index in range(2):
        alone = built(images[index : index + 1])
        for name, maps in both.items():
            torch.testing.assert_close(maps[index : index + 1], alone[name], rtol=0, atol=1e-8)


def test_bfloat16_autocast():
    built = model(FPT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = step(built)
    assert all(loss.isfinite() for loss in found.values())
    gradients = [p.grad for p in built.backbone.parameters() if p.requires_grad]
    assert all(gradient.isfinite().all() for gradient in gradients)


# ---- errors ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("IN_FEATURES", ["res4", "res6"], r"MODEL.FPT.IN_FEATURES names \['res6'\], but "
         r"MODEL.RESNETS.OUT_FEATURES gives \['res2'"),
        ("IN_FEATURES", ["res5", "res4"], "MODEL.FPT: IN_FEATURES must be fine to coarse"),
        ("BASE", "bpf", r"MODEL.FPT: base: there is no 'bpf'; did you mean bfp\?"),
        ("SCALE", '"sqrd"', r"MODEL.FPT.SCALE must be .* got 'sqrd'; did you mean sqrt\?"),
        ("TRANSFORMERS", ["st", "lgt"], "MODEL.FPT: transformers: .* got 'lgt'"),
        ("KV_POOL", [2, 1], "MODEL.FPT: kv_pool: expected one number or 4"),
        ("LOCAL_SIZE", 5, "MODEL.FPT: local_size: expected 0 for levels of different sizes"),
        ("CHANNELS", 48, "MODEL.FPT: norm: GN with 32 groups"),
        ("GT_PARTS", 5, "MODEL.FPT: .*5 and 32"),
        ("NORM", "FrozenBN", "MODEL.FPT: norm: expected one of"),
    ],
)  # fmt: skip
def test_values_that_no_neck_can_have_are_the_users_to_mend(key, value, message):
    with pytest.raises(UserError, match=message):
        backbone(f"MODEL.FPT.{key}", value)
