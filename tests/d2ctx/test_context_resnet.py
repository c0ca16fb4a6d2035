"""Context in ResNets: where it stands, what it leaves alone, every neck and every detector."""

import logging

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import ResNet, build_backbone, build_resnet_backbone
from torch import nn

from ctxops.heads.augmented_conv import AugmentedConv
from ctxops.heads.global_context import GlobalContext
from ctxops.heads.non_local import NonLocal
from ctxops.sr import SqueezeReasoning
from d2ctx import UserError, norm
from d2ctx.bottom_up import build_bottom_up, unused_context
from d2ctx.config import load_config
from d2ctx.context_resnet import ContextResNet, augment_convolutions, block_names, make_contexts
from d2ctx.norm import usable_norm
from tests.d2ctx import tiny
from tests.d2ctx.context_parts import (
    FPT,
    KINDS,
    PLAIN,
    config,
    context,
    detections,
    idle,
    mixed_sizes,
    model,
    step,
)

RGB = ShapeSpec(channels=3)
OURS = "build_context_resnet_fpn_backbone"
CLASSES = {"nl": NonLocal, "gc": GlobalContext, "aa": AugmentedConv, "sr": SqueezeReasoning}
OFF = ("MODEL.CONTEXT_BLOCK.KIND", "none")


def resnet(*opts) -> ResNet:
    torch.manual_seed(0)
    return build_resnet_backbone(config(PLAIN, *OFF, *opts), RGB).eval()


def bottom_up(kind, *opts):
    torch.manual_seed(0)
    return build_bottom_up(config(PLAIN, *context(kind), *opts), RGB).eval()


def image(height=64, width=96):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(2))


class Mark(nn.Module):
    """Adds a number; remembers what it saw."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels, self.seen = channels, None

    def forward(self, x):
        self.seen = x
        return x + 1


# ---- where it stands -------------------------------------------------------------------------
def test_modules_see_the_output_of_their_block_and_feed_the_next():
    plain, net = resnet(), resnet()
    marks = {"res2_1": Mark(32), "res5_2": Mark(256)}
    outputs = ContextResNet(resnet=net, contexts=marks)(image())
    x = plain.res2[1](plain.res2[0](plain.stem(image())))
    torch.testing.assert_close(marks["res2_1"].seen, x)
    x = plain.res2[2](x + 1)
    torch.testing.assert_close(outputs["res2"], x)
    x = plain.res4(plain.res3(x))
    torch.testing.assert_close(outputs["res4"], x)
    torch.testing.assert_close(outputs["res5"], plain.res5(x) + 1)
    assert (marks["res2_1"].seen >= 0).all()


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ("all", [f"res4_{i}" for i in range(6)] + [f"res5_{i}" for i in range(3)]),
        ("last", ["res4_5", "res5_2"]),
        ("before_last", ["res4_4", "res5_1"]),
    ],
)
def test_blocks(blocks, expected):
    found = make_contexts(resnet(), Mark, stages=["res4", "res5"], blocks=blocks)
    assert list(found) == expected
    assert [mark.channels for mark in found.values()] == [
        128 if name.startswith("res4") else 256 for name in expected
    ]


def test_the_only_block_of_a_stage_is_every_choice():
    net = resnet()
    del net.res5[1:]
    assert [block_names(net, "res5", blocks=b) for b in ("all", "last", "before_last")] == [
        ["res5_0"]
    ] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_yaml_puts_the_kind_into_the_chosen_stages(kind):
    net = bottom_up(kind)
    found = {n for n, module in net.named_modules() if isinstance(module, CLASSES[kind])}
    blocks = [("res4", i) for i in range(6)] + [("res5", i) for i in range(3)]
    name = "{}.{}.conv2.augmented" if kind == "aa" else "context.{}_{}"
    assert found == {name.format(*block) for block in blocks}


@pytest.mark.parametrize("kind", ["nl", "gc"])
def test_reduction_and_norm_reach_the_module(kind):
    opts = ("MODEL.CONTEXT_BLOCK.REDUCTION", 8, "MODEL.CONTEXT_BLOCK.NORM", "GN")
    module = bottom_up(kind, *opts).context["res5_0"]
    hidden = module.value.out_channels if kind == "nl" else module.reduce.out_features
    assert hidden == 32
    assert kind == "gc" or isinstance(module.norm, nn.GroupNorm)


def test_none_is_detectron2s_resnet():
    net = build_bottom_up(config(PLAIN, *OFF), RGB)
    assert type(net) is ResNet


# ---- what it leaves alone --------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_are_those_of_a_plain_resnet(kind):
    plain, net = resnet(), bottom_up(kind)
    assert net.output_shape() == plain.output_shape()
    missing, extra = net.load_state_dict(plain.state_dict(), strict=False)
    if kind == "aa":
        names = {f"{s}.{i}.conv2.weight" for s, n in (("res4", 6), ("res5", 3)) for i in range(n)}
        assert set(extra) == names
        assert all(".conv2.augmented." in name for name in missing)
    else:
        assert not extra
        assert all(name.startswith("context.") for name in missing)


@pytest.mark.parametrize("kind", ["nl", "gc", "sr"])
@pytest.mark.parametrize("size", [(64, 96), (33, 47)])
def test_before_training_the_maps_are_those_of_a_plain_resnet(kind, size):
    plain, net = resnet(), bottom_up(kind)
    net.load_state_dict(plain.state_dict(), strict=False)
    for name, x in plain(image(*size)).items():
        assert torch.equal(net(image(*size))[name], x)


@pytest.mark.parametrize("size", [(64, 96), (33, 47), (32, 32)])
def test_augmented_convolutions_keep_the_sizes(size):
    plain = resnet()(image(*size))
    assert {n: x.shape for n, x in bottom_up("aa")(image(*size)).items()} == {
        n: x.shape for n, x in plain.items()
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("freeze_at", [3, 5])
def test_context_is_trained_in_a_frozen_resnet(kind, freeze_at):
    opts = ("MODEL.BACKBONE.FREEZE_AT", freeze_at, "MODEL.RESNETS.NORM", "FrozenBN")
    stages = ["res3", "res4"]
    net = bottom_up(kind, *opts, "MODEL.CONTEXT_BLOCK.STAGES", stages, "MODEL.SR.STAGES", stages)
    modules = [m for m in net.modules() if isinstance(m, CLASSES[kind])]
    assert len(modules) == 4 + 6
    for module in modules:
        assert all(p.requires_grad for p in module.parameters())
        assert not any(isinstance(m, FrozenBatchNorm2d) for m in module.modules())
    trained = {n.split(".")[0] for n, p in net.named_parameters() if p.requires_grad}
    rest = {f"res{i}" for i in range(freeze_at + 1, 6)}
    assert trained == rest | ({"res3", "res4"} if kind == "aa" else {"context"})


def test_stages_that_no_neck_needs_are_not_built():
    net = ContextResNet(resnet=resnet("MODEL.RESNETS.OUT_FEATURES", ["stem", "res3"]), contexts={})
    assert list(net(image())) == list(net.output_shape()) == ["stem", "res3"]


# ---- every neck, every detector --------------------------------------------------------------
NECKS = {
    "fpn": (PLAIN, ()),
    "a2fpn": ("a2fpn/mask_rcnn_a2fpn_instant.yaml", ()),
    "pafpn": ("a2fpn/mask_rcnn_a2fpn_lite_instant.yaml", (
        *("MODEL.A2FPN.LATERAL", "conv", "MODEL.A2FPN.TOP_DOWN", "nearest"),
        *("MODEL.A2FPN.BOTTOM_UP", "conv"))),
    "fpt": (FPT, ("MODEL.FPT.TRANSFORMERS", ["st"])),
}  # fmt: skip
PANOPTIC = (
    *("MODEL.META_ARCHITECTURE", "ContextPanopticFPN", "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32),
    *("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3),
)
CASCADE = (
    *("MODEL.ROI_HEADS.NAME", "ContextCascadeROIHeads"),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
)
HTC = (
    *CASCADE[2:], "MODEL.ROI_HEADS.NAME", "HybridTaskROIHeads",
    *("MODEL.META_ARCHITECTURE", "ContextHTC", "MODEL.HTC.SEMANTIC.ENABLED", False),
)  # fmt: skip
SYSTEMS = {"mask_rcnn": (), "cascade": CASCADE, "htc": HTC, "panoptic": PANOPTIC}


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("neck", NECKS)
def test_sr_goes_with_every_neck_and_every_detector(neck, system):
    name, opts = NECKS[neck]
    sr = ("MODEL.CONTEXT_BLOCK.KIND", "sr", "MODEL.SR.BLOCKS", "last")
    built = model(name, *opts, *sr, *SYSTEMS[system])
    found = step(built)
    assert all(loss.isfinite() for loss in found.values())
    assert not idle(built)
    assert list(built.backbone.bottom_up.context) == ["res5_2"]
    (out,) = detections(built, tiny.batch(num_images=1))
    assert "instances" in out


@pytest.mark.parametrize("kind", ["nl", "gc", "aa"])
def test_the_other_kinds_train(kind):
    built = model(FPT, *context(kind), "MODEL.FPT.TRANSFORMERS", ["rt"])
    found = step(built, mixed_sizes())
    assert all(loss.isfinite() for loss in found.values())
    assert not idle(built)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast(kind):
    built = model(PLAIN, *context(kind))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = step(built, tiny.batch(num_images=1))
    assert all(loss.isfinite() for loss in found.values())
    gradients = [p.grad for p in built.backbone.parameters() if p.requires_grad]
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_compiles(kind):
    net = bottom_up(kind)
    compiled = torch.compile(net, fullgraph=True)(image())
    torch.testing.assert_close(compiled, net(image()), rtol=1e-3, atol=1e-4)


# ---- norms -----------------------------------------------------------------------------------
def test_syncbn_needs_several_processes_on_gpus(monkeypatch):
    def found(device, processes, name="SyncBN"):
        monkeypatch.setattr(norm.comm, "get_world_size", lambda: processes)
        return usable_norm(config(PLAIN, "MODEL.DEVICE", device), name, key="SR.NORM")

    assert found("cuda", 2) == "SyncBN"
    assert [found("cuda", 1), found("cpu", 2), found("cpu", 1)] == ["BN"] * 3
    assert [found("cpu", 1, name) for name in ("GN", "")] == ["GN", ""]


def test_the_replaced_norm_is_told(caplog):
    with caplog.at_level(logging.INFO, logger="d2ctx.norm"):
        usable_norm(config(PLAIN), "SyncBN", key="SR.NORM_OF_THIS_TEST")
        usable_norm(config(PLAIN), "SyncBN", key="SR.NORM_OF_THIS_TEST")
    (record,) = caplog.records
    assert "MODEL.SR.NORM_OF_THIS_TEST SyncBN needs several processes" in record.getMessage()


# ---- errors ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("MODEL.CONTEXT_BLOCK.KIND", "gcn"), r"KIND: there is no 'gcn'; did you mean gc\?"),
        ((*context("nl"), "MODEL.CONTEXT_BLOCK.STAGES", ["res6"]),
         "MODEL.CONTEXT_BLOCK: stage: expected one of 'res2', .* got 'res6'"),
        ((*context("nl"), "MODEL.CONTEXT_BLOCK.STAGES", []), "STAGES is empty"),
        ((*context("gc"), "MODEL.CONTEXT_BLOCK.BLOCKS", "first"),
         "MODEL.CONTEXT_BLOCK: blocks: expected one of 'all', 'last', 'before_last'"),
        ((*context("gc"), "MODEL.CONTEXT_BLOCK.REDUCTION", 3),
         "MODEL.CONTEXT_BLOCK: reduction and in_channels: .* got 3 and 128"),
        ((*context("aa"), "MODEL.RESNETS.NUM_GROUPS", 4),
         "MODEL.CONTEXT_BLOCK: res4_0: attention augments plain 3x3 convolutions"),
        (("MODEL.FPN.IN_FEATURES", ["res2", "res7"]),
         r"MODEL.FPN.IN_FEATURES names \['res7'\], but MODEL.RESNETS.OUT_FEATURES gives"),
    ],
)  # fmt: skip
def test_values_that_no_network_can_have_are_the_users_to_mend(opts, message):
    with pytest.raises(UserError, match=message):
        build_backbone(config(PLAIN, *opts))


def test_a_builder_that_would_leave_the_context_out_is_named():
    name = "build_resnet_fpn_backbone"
    (message,) = unused_context(config(PLAIN, *context("nl"), "MODEL.BACKBONE.NAME", name))
    assert "MODEL.CONTEXT_BLOCK.KIND is nl" in message
    assert f"{name} is Detectron2's" in message
    assert OURS in message
    assert not unused_context(config(PLAIN, *context("nl")))
    assert not unused_context(config(PLAIN, *OFF, "MODEL.BACKBONE.NAME", name))


def test_the_check_before_a_run_says_so(launch, capsys):
    name = "build_resnet_fpn_backbone"
    code = launch.main("MODEL.CONTEXT_BLOCK.KIND", "gc", "MODEL.BACKBONE.NAME", name)
    assert code == 2
    assert f"{name} is Detectron2's, which knows of no context" in capsys.readouterr().err


def test_keys_that_stand_for_no_block_are_refused():
    with pytest.raises(ValueError, match="keys of contexts: expected one of 'res2_0'.* 'res5_3'"):
        ContextResNet(resnet=resnet(), contexts={"res5_3": Mark(256)})


def test_a_deformable_convolution_is_not_augmented():
    net = resnet()
    net.res5[0].conv2 = nn.Identity()
    with pytest.raises(ValueError, match="res5_0: attention augments plain"):
        augment_convolutions(net, stages=["res5"], blocks="all")


def test_every_shipped_context_loads():
    for name in ("nl", "gc", "aa"):
        cfg = load_config(str(tiny.CONFIGS / f"fpt/table3/{name}_fpt.yaml"))
        assert cfg.MODEL.CONTEXT_BLOCK.KIND == name
