"""Networks of Squeeze Reasoning have the paper's parameters and costs."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ctxops.sr import SqueezeReasoning
from segtrain.analyze import analyze
from segtrain.models.classification import build_classifier
from tests.segtrain.toy_network import network, section
from tests.segtrain.toy_sr import CONTEXT, full_size
from tests.segtrain.train_toys import config as run_config

R50 = {"name": "resnet"}


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("version", "head", "backbone", "total"),
    [
        (1, {}, 8_020_128, 9_370_931),
        (2, {}, 17_474_208, 18_825_011),
        (2, {"context": "sr"}, 17_474_208, 18_874_995),
    ],
)
def test_real_time_networks_have_the_papers_parameters(version, head, backbone, total):
    model = full_size({"name": "df", "version": version}, {"name": "df", **head})
    assert (parameters(model.backbone), parameters(model)) == (backbone, total)


@pytest.mark.parametrize(("version", "macs"), [(1, 746.2e6), (2, 1773.8e6)])
def test_df_costs_what_was_published(version, macs):
    model = full_size({"name": "df", "version": version}, {"name": "df"}).backbone
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2 == pytest.approx(macs, abs=0.05e6)


def test_df_offers_its_stages():
    one, two = (
        full_size({"name": "df", "version": v}, {"name": "df"}).backbone.maps for v in (1, 2)
    )
    assert [(m.channels, m.stride) for m in one.values()] == [
        *[(64, 4), (64, 8), (128, 16), (256, 32), (512, 32)]
    ]
    assert [(m.channels, m.stride) for m in two.values()] == [
        *[(64, 4), (128, 8), (256, 16), (512, 32)]
    ]


@pytest.mark.parametrize(
    ("module", "own"),
    [
        ("none", 0),
        ("sr", 395_328),
        ("se", 32_768),
        ("nl", 525_312),
        ("a2", 525_312),
        ("cgnl", 410_624),
        ("emau", 525_824),
        ("rcca", 328_321),
        ("encoding", 542_304),
        ("apnb", 394_752),
        ("gc", 33_888),
        ("oc", 920_576),
    ],
)
def test_context_between_two_convolutions(module, own):
    head = full_size(R50, {"name": "context", "module": module}).head
    assert parameters(head.context) == own
    assert parameters(head) == 11_798_528 + own + 512 * 19 + 19


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"squeeze": "gap"}, 264_256),
        ({"nodes": 32}, 395_920),
        ({"wr": "full"}, 394_816),
        ({"squeeze": "gap", "wr": "full"}, 263_744),
        ({"preset": "released"}, 395_920),
        ({"reason": "sa"}, 3 * 512 * 256 + 512 + 1024 + 768),
        ({"reason": "fc"}, 3 * 512 * 256 + 512 + 1024 + 8192),
        ({"reason": "none"}, 3 * 512 * 256 + 512 + 1024),
        ({"node_norm": "", "norm": ""}, 3 * 512 * 256 + 512 + 512),
    ],
)
def test_reasoning_by_its_keys(fields, count):
    head = full_size(R50, {"name": "context", "sr": fields}).head
    assert parameters(head.context) == count


def test_every_key_of_reasoning_reaches_the_module():
    given = {
        **{"reduction": 4, "nodes": 8, "squeeze": "ghp", "pool": "sum", "reason": "sa"},
        **{"adj": "released", "wr": "full", "norm": "GN", "node_norm": "LN"},
        **{"sa_softmax": False, "zero_init": True},
    }
    module = full_size(R50, {"name": "context", "sr": given}).head.context
    direct = SqueezeReasoning(in_channels=512, **given)
    assert str(module) == str(direct)
    assert (module.nodes, module.pool) == (8, "sum")
    assert module.reason.softmax is False
    small = CONTEXT | {"sr": {"zero_init": True}}
    assert not network(head=small).head.context.norm.weight.any()
    adjacent = network(head=CONTEXT | {"sr": {"adj": "released"}}).head.context.reason
    assert adjacent.adj == "released"


@pytest.mark.parametrize(
    ("layout", "count"), [("official_2021", 24_001_699), ("official_2024", 3_815_587)]
)
def test_official_heads(layout, count):
    assert parameters(
        full_size(R50, {"name": "context", "layout": layout, "sr": {"nodes": 32}}).head
    ) == count  # fmt: skip


@pytest.mark.parametrize(("name", "count"), [("psp", 23_073_792), ("aspp", 15_535_104)])
def test_pyramids_in_the_place_of_both_convolutions(name, count):
    assert parameters(full_size(R50, {"name": name}).head.pyramid) == count


def test_wide_resnet():
    model = full_size({"name": "wide_resnet38"}, {"name": "deeplab_plus", "sr_position": "none"})
    assert parameters(model.backbone) == 105_070_912
    assert parameters(model) == 137_112_659
    strides = {name: info.stride for name, info in model.backbone.maps.items()}
    assert strides == {"mod2": 2, "mod3": 4, "mod4": 8, "mod5": 8, "mod6": 8, "mod7": 8}
    dropped = [
        (name, m.p) for name, m in model.backbone.named_modules() if isinstance(m, nn.Dropout)
    ]
    assert [p for _, p in dropped] == [0.3, 0.5]
    dilations = {
        name: {m.dilation for m in model.backbone.get_submodule(name).modules()
               if getattr(m, "kernel_size", 0) == (3, 3)}
        for name in strides
    }  # fmt: skip
    assert dilations == {
        **dict.fromkeys(("mod2", "mod3", "mod4"), {(1, 1)}),
        **{"mod5": {(2, 2)}, "mod6": {(4, 4)}, "mod7": {(4, 4)}},
    }


@pytest.mark.parametrize(
    ("depth", "gate", "count"),
    [
        (50, "none", 25_557_032),
        (50, "sr", 25_642_120),
        (101, "none", 44_549_160),
        (101, "sr", 44_710_952),
        (50, "se", 28_071_976),
    ],
)
def test_classifiers(depth, gate, count):
    with torch.device("meta"):
        assert parameters(build_classifier(depth=depth, gate=gate)) == count


def test_a_classifier_is_a_backbone():
    fields = {"name": "resnet", "stem": "plain", "gate": "sr", "output_stride": 32}
    backbone = full_size(fields, CONTEXT).backbone
    with torch.device("meta"):
        source = build_classifier(depth=50, num_classes=7)
    shapes = {name: tuple(value.shape) for name, value in source.state_dict().items()}
    assert shapes.pop("fc.weight") == (7, 2048)
    del shapes["fc.bias"]
    assert {n: tuple(v.shape) for n, v in backbone.state_dict().items()} == shapes
    assert source.eval()(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 7)


def papers_count(module: nn.Module, x: torch.Tensor) -> int:
    """Convolutions with bias, 2 per element of a batch norm, 1 of a ReLU or of a pooled input."""
    total = 0

    def add(part, inputs, out):
        nonlocal total
        if isinstance(part, nn.Conv2d):
            total += out.numel() * (part.weight[0].numel() + (part.bias is not None))
        elif isinstance(part, nn.BatchNorm2d | nn.BatchNorm1d):
            total += 2 * out.numel()
        elif isinstance(part, nn.ReLU):
            total += out.numel()
        elif isinstance(part, nn.MaxPool2d):
            total += inputs[0].numel()

    hooks = [part.register_forward_hook(add) for part in module.modules()]
    module.eval()(x)
    for hook in hooks:
        hook.remove()
    return total


def test_costs_of_table_4():
    image = torch.empty(1, 3, 768, 768, device="meta")
    deep = torch.empty(1, 2048, 96, 96, device="meta")
    model = full_size(R50, {"name": "context", "module": "none"})
    assert papers_count(model.backbone, image) / 1e9 == pytest.approx(241.135, abs=5e-4)
    two = papers_count(nn.Sequential(model.head.reduce, model.head.refine), deep)
    assert two / 1e9 == pytest.approx(108.745, abs=5e-4)
    atrous = full_size(R50, {"name": "aspp"}).head.pyramid
    image_pool = deep.numel()
    found = (papers_count(atrous, deep) + image_pool) / 1e9
    assert found == pytest.approx(138.366, abs=5e-4)
    pooling = full_size(R50, {"name": "psp"}).head.pyramid
    grids = 4 * deep.numel()
    assert (papers_count(pooling, deep) + grids) / 1e9 == pytest.approx(174.088, abs=5e-4)


@pytest.mark.parametrize(("version", "cost"), [(1, 31.3), (2, 74.4)])
def test_cost_of_df_at_full_resolution(version, cost):
    backbone = full_size({"name": "df", "version": version}, {"name": "df"}).backbone
    found = papers_count(backbone, torch.empty(1, 3, 1024, 2048, device="meta"))
    assert round(found / 1e9, 1) == cost


@pytest.mark.parametrize(
    ("depth", "gate", "cost"),
    [(50, "none", 4.122), (50, "sr", 4.127), (101, "none", 7.849), (101, "sr", 7.858)],
)
def test_cost_of_classifiers(depth, gate, cost):
    """Pooled inputs and the last layer are added: they are no modules that a hook would see."""
    with torch.device("meta"):
        net = build_classifier(depth=depth, gate=gate)
    found = papers_count(net, torch.empty(1, 3, 224, 224, device="meta"))
    found += net.fc.weight.numel() + 2048 * 7 * 7
    for name, side in (("layer1", 56), ("layer2", 28), ("layer3", 14), ("layer4", 7)):
        blocks = net.get_submodule(name)
        if gate == "sr":
            found += len(blocks) * blocks[0].bn3.num_features * side**2
    assert found / 1e9 == pytest.approx(cost, abs=6e-4)


@pytest.mark.parametrize("name", ["psp", "aspp"])
def test_pyramids_are_analysed_with_one_image(name):
    """Though one image would not train them: image-wide pools have batch norms."""
    run = run_config("none").model_copy(update={"model": section(head={"name": name})})
    costs = analyze(run, num_classes=5, size=(64, 96))
    twice = analyze(run, num_classes=5, size=(64, 96), batch=2)
    assert twice["total"].macs == 2 * costs["total"].macs
