"""The Feature Pyramid Transformer: wiring, options, sizes, gradients, numbers of parameters."""

from pathlib import Path

import pytest
import torch
from torch import nn

from ctxops.drop import DropBlock
from ctxops.fpt import FeaturePyramidTransformer, build_fpt
from ctxops.grounding import GroundingTransformer, LocalGroundingTransformer
from ctxops.lateral import PyramidLateral
from ctxops.levels import PointwiseLateral, check_levels, level_pairs, pair_name
from tests.ctxops.fpt_parts import close, count, gradients, lively, maps
from tests.oracles import fpt as oracle

KEYS = Path(__file__).with_name("fpt_state_dict.txt")
RESNET50 = (256, 512, 1024, 2048)
UFP = {"same_size": True, "local_size": 5}
ODD = [(7, 5), (4, 3), (2, 2)]
FOUR = [(16, 23), (8, 12), (4, 6), (2, 3)]


def block(num_levels=3, channels=8, **options):
    """Without laterals."""
    options = {"norm": "", "lateral": "none", **options}
    return build_fpt(in_channels=[channels] * num_levels, channels=channels, **options)


def full(**options):
    options = {"in_channels": [256] * 4, "lateral": "none", **options}
    with torch.device("meta"):
        return build_fpt(**options)


def close_all(actual, expected, atol=1e-10):
    for a, b in zip(actual, expected, strict=True):
        close(a, b, atol)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"norm": ""}, ODD),
        ({"norm": "BN"}, ODD),
        ({"norm": "BN", **UFP}, [(3, 4)] * 3),
        ({"norm": "GN", "channels": 32, "num_levels": 2}, [(3, 3), (2, 2)]),
    ],
    ids=["no_norm", "batch_norm", "unscathed", "group_norm"],
)
def test_equals_the_equations(options, sizes):
    module = lively(block(**options))
    levels = maps(*sizes, channels=module.channels)
    wiring = {"window": 5, "same_size": True} if "same_size" in options else {}
    expected = oracle.pyramid_transformer([x[0] for x in levels], module.state_dict(), **wiring)
    close_all([out[0] for out in module(levels)], expected)


class Mark(nn.Module):
    """Returns a map full of one number, of the size of its first argument, and notes arguments."""

    def __init__(self, number):
        super().__init__()
        self.number = number
        self.seen = ()

    def forward(self, *maps):
        self.seen = maps
        return torch.full_like(maps[0], self.number)


def marked(names=("p2", "p3", "p4", "p5"), **changes):
    """A block of marks; ST of level 3 is 3, RT 4 <- 2 is 42.5, GT 2 <- 4 is 24.5."""
    order = level_pairs(len(names))
    parts = {
        "st": {name: Mark(float(name[1])) for name in names},
        "gt": {pair_name(names[f], names[c]): Mark(10 * f + c + 22.5) for f, c in order},
        "rt": {pair_name(names[c], names[f]): Mark(10 * c + f + 22.5) for f, c in order},
        "fuse": {name: nn.Identity() for name in names},
        "drop": {},
        **changes,
    }
    return FeaturePyramidTransformer(channels=1, num_levels=len(names), **parts)


def test_order_of_the_concatenation():
    levels = [torch.full((1, 1, *size), -1.0) for size in FOUR]
    orders = [out[0, :, 0, 0].tolist() for out in marked()(levels)]
    assert orders == [
        [2, 23.5, 24.5, 25.5, -1],
        [3, 32.5, 34.5, 35.5, -1],
        [4, 43.5, 42.5, 45.5, -1],
        [5, 54.5, 53.5, 52.5, -1],
    ]


def test_transformers_read_the_raw_maps_of_their_levels():
    module, levels = marked(), maps(*FOUR, channels=1)
    module(levels)
    for kind in (module.st, module.gt, module.rt):
        for name, part in kind.items():
            wanted = [levels[int(level[1]) - 2] for level in name.split("_from_")]
            assert len(part.seen) == len(wanted)
            assert all(a is b for a, b in zip(part.seen, wanted, strict=True))


def test_parts_may_be_left_out():
    module = marked(st={"p3": Mark(3.0)}, gt={}, rt={"p4_from_p2": Mark(42.5)})
    levels = [torch.full((1, 1, *size), -1.0) for size in FOUR]
    orders = [out[0, :, 0, 0].tolist() for out in module(levels)]
    assert orders == [[-1], [3, -1], [42.5, -1], [-1]]


def test_drop_comes_last_and_feeds_the_extra_level():
    module = marked(drop={"p5": Mark(7.0)}, extra_level=True)
    *_, p4, p5, p6 = module([torch.zeros(1, 1, *size) for size in FOUR])
    assert p4.unique().tolist() == [0, 4, 42.5, 43.5, 45.5]
    assert p5.unique().tolist() == p6.unique().tolist() == [7]


def changed(module, index):
    """Levels whose output depends on one input level."""
    levels = maps(*FOUR, dtype=torch.float32)
    before = module(levels)
    levels[index] = levels[index] + 1
    return [bool((a - b).abs().max() > 1e-6) for a, b in zip(module(levels), before, strict=True)]


@torch.no_grad()
def test_which_levels_reach_which():
    options = {"num_levels": 4, "dropblock_prob": 0.0}
    everywhere, nearby = block(**options), block(pairs="adjacent", **options)
    for index in range(4):
        assert changed(everywhere, index) == [True] * 4
        assert changed(nearby, index) == [abs(index - other) <= 1 for other in range(4)]
    assert changed(block(transformers=["gt"], **options), 1) == [True, True, False, False]
    assert changed(block(transformers=["rt"], **options), 1) == [False, True, True, True]
    assert changed(block(transformers=["st"], **options), 1) == [False, True, False, False]


@pytest.mark.parametrize(
    ("transformers", "pairs", "shares"),
    [
        (["st", "gt", "rt"], "all", [5, 5, 5, 5]),
        (["st", "gt", "rt"], "adjacent", [3, 4, 4, 3]),
        (["st"], "all", [2, 2, 2, 2]),
        (["gt"], "all", [4, 3, 2, 1]),
        (["rt"], "all", [1, 2, 3, 4]),
        (["rt", "gt"], "adjacent", [2, 3, 3, 2]),
    ],
)
def test_fusion_takes_as_many_maps_as_there_are(transformers, pairs, shares):
    module = full(transformers=transformers, pairs=pairs)
    assert [fuse.conv.in_channels / 256 for fuse in module.fuse.values()] == shares


@pytest.mark.parametrize("training", [True, False])
def test_no_transformers_is_the_identity(training):
    module = block(transformers=[], extra_level=True).train(training)
    assert count(module) == 0
    levels = maps(*ODD)
    *outputs, extra = module(levels)
    assert all(a is b for a, b in zip(outputs, levels, strict=True))
    assert torch.equal(extra, levels[-1][..., ::2, ::2])


@pytest.mark.parametrize(
    "sizes", [ODD, [(9, 7), (8, 7), (3, 1)], [(1, 1)] * 3, [(5, 1), (3, 1), (2, 1)]]
)
def test_any_sizes(sizes):
    outputs = block(extra_level=True)(maps(*sizes, batch=2, dtype=torch.float32))
    extra = tuple(-(-extent // 2) for extent in sizes[-1])
    assert [tuple(out.shape) for out in outputs] == [(2, 8, *size) for size in [*sizes, extra]]


def test_extra_level_is_the_subsampled_output():
    module, levels = lively(block(extra_level=True)), maps(*FOUR[:3])
    *_, p4, p5 = module(levels)
    assert torch.equal(p5, p4[..., ::2, ::2])
    module.extra_level = False
    assert len(module(levels)) == 3


TABLE = {
    ("st",): (5_776_384, 5_776_384, 5_776_384),
    ("gt",): (7_486_976, 4_924_160, 7_482_368),
    ("rt",): (18_887_680, 9_443_840, 16_526_336),
    ("st", "gt"): (10_902_016, 8_339_200, 10_897_408),
    ("st", "rt"): (22_302_720, 12_858_880, 19_941_376),
    ("gt", "rt"): (24_013_312, 12_006_656, 21_647_360),
    ("st", "gt", "rt"): (27_428_352, 15_421_696, 25_062_400),
}


@pytest.mark.parametrize("kinds", TABLE, ids="+".join)
def test_numbers_of_parameters(kinds):
    variants = {}, {"pairs": "adjacent"}, UFP
    assert tuple(count(full(transformers=kinds, **v)) for v in variants) == TABLE[kinds]


def test_numbers_of_parameters_of_parts():
    module = full(in_channels=RESNET50, lateral="conv")
    parts = (module.lateral, module.st, module.gt, module.rt, module.fuse)
    counts = [count(part) for part in parts]
    assert counts == [984_064, 1_055_744, 1_586_688, 12_987_392, 20 * 589_824 + 2_048]
    assert count(full(pairs="adjacent").gt) == 793_344
    assert count(full(**UFP).gt) == 1_582_080
    normed = full(in_channels=RESNET50, lateral="conv", lateral_norm="GN")
    assert count(normed.lateral) == 983_040 + 4 * 512


@pytest.mark.parametrize(
    ("kinds", "pairs", "expected"),
    [
        (("st",), "all", 95.8),
        (("gt",), "all", 170.4),
        (("rt",), "all", 107.7),
        (("st", "gt", "rt"), "all", 295.5),
        (("st", "gt", "rt"), "adjacent", 184.1),
    ],
)
def test_complexity_of_the_convolutions(kinds, pairs, expected):
    """Giga multiply-adds at 800x1000."""
    module, total = full(transformers=kinds, pairs=pairs), 0

    def add(conv, _, out):
        nonlocal total
        total += out[0, 0].numel() * conv.weight.numel()

    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_hook(add)
    sizes = [(200, 250), (100, 125), (50, 63), (25, 32)]
    module.eval()([torch.empty(1, 256, *size, device="meta") for size in sizes])
    assert total / 1e9 == pytest.approx(expected, abs=0.051)


def test_state_dict_keys():
    """Checkpoints outlive code: a change here is a change of format."""
    module = full(in_channels=RESNET50, lateral="conv")
    lines = [f"{key} {list(value.shape)}\n" for key, value in module.state_dict().items()]
    assert "".join(lines) == KEYS.read_text()


def test_keys_name_levels_not_positions():
    for options in ({}, UFP, {"norm": "BN", "dropblock_ramp": 10}, {"share_qk": True}):
        keys = full(**options).state_dict()
        assert not any(part.isdigit() for key in keys for part in key.split("."))


def test_state_dict_survives_a_round_trip():
    source, target, levels = lively(block()), block().double().eval(), maps(*ODD)
    target.load_state_dict(source.state_dict())
    close_all(target(levels), source(levels))


def options_of(module):
    st, gt, rt = module.st["p3"], module.gt["p2_from_p3"], module.rt["p4_from_p2"]
    return {
        "st": (st.mixture.parts, st.similarity, st.pi_from, st.attn_dropout, st.impl),
        "gt": (gt.mixture.parts, gt.similarity, gt.pi_from, gt.attn_dropout, gt.impl),
        "width": (st.query.out_channels, gt.value.out_channels),
        "scale": (st.scale, gt.scale),
        "share_qk": st.key is None,
        "kv_pool": [part.kv_pool for part in module.st.values()],
        "rt": (rt.gap, rt.gate),
    }


DEFAULTS = {
    "st": (2, "dot", "key", 0.0, "auto"),
    "gt": (4, "euclidean", "key", 0.0, "auto"),
    "width": (8, 8),
    "scale": (1 / 8**0.5, 1 / 8**0.5),
    "share_qk": False,
    "kv_pool": [1, 1, 1],
    "rt": (2, "none"),
}


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({}, {}),
        ({"st_parts": 4}, {"st": (4, "dot", "key", 0.0, "auto")}),
        ({"gt_parts": 1}, {"gt": (1, "euclidean", "key", 0.0, "auto")}),
        ({"st_similarity": "euclidean"}, {"st": (2, "euclidean", "key", 0.0, "auto")}),
        ({"gt_similarity": "dot"}, {"gt": (4, "dot", "key", 0.0, "auto")}),
        ({"inner_channels": 4}, {"width": (4, 4), "scale": (0.5, 0.5)}),
        ({"scale": "none"}, {"scale": (1.0, 1.0)}),
        ({"scale": 0.3}, {"scale": (0.3, 0.3)}),
        ({"share_qk": True}, {"share_qk": True}),
        ({"kv_pool": 2}, {"kv_pool": [2, 2, 2]}),
        ({"kv_pool": (4, 2, 1)}, {"kv_pool": [4, 2, 1]}),
        ({"rt_gate": "sigmoid"}, {"rt": (2, "sigmoid")}),
        ({"same_size": True}, {"rt": (0, "none")}),
        (
            {"pi_from": "query"},
            {"st": (2, "dot", "query", 0.0, "auto"), "gt": (4, "euclidean", "query", 0.0, "auto")},
        ),
        (
            {"attn_dropout": 0.1, "impl": "naive"},
            {"st": (2, "dot", "key", 0.1, "naive"), "gt": (4, "euclidean", "key", 0.1, "naive")},
        ),
    ],
)
def test_options_reach_the_parts(options, changes):
    module = block(**options)
    assert options_of(module) == {**DEFAULTS, **changes}
    assert type(module.gt["p2_from_p3"]) is GroundingTransformer


def test_local_options_reach_the_local_transformers():
    module = block(same_size=True, local_size=3, local_impl="unfold", impl="naive", gt_parts=2)
    for part in module.gt.values():
        assert isinstance(part, LocalGroundingTransformer)
        assert (part.window, part.impl, part.mixture.parts) == (3, "unfold", 2)
    assert module.st["p2"].impl == "naive"


def test_norm_option_is_one_setting_for_all_norms():
    kinds = {"GN": nn.GroupNorm, "BN": nn.BatchNorm2d, "SyncBN": nn.SyncBatchNorm}
    for norm, kind in kinds.items():
        norms = [m for name, m in full(norm=norm).named_modules() if name.endswith(".norm")]
        # ST 4, GT 6, RT 6 pairs of two convolutions and 10 links, fusion 4
        assert len(norms) == 4 + 6 + 2 * 6 + 10 + 4
        assert {type(part) for part in norms} == {kind}
    convs = [m for m in full(norm="").modules() if isinstance(m, nn.Conv2d)]
    assert all(conv.bias is not None for conv in convs)


def test_zero_gamma_option():
    module = block(2, 32, norm="GN", gt_zero_gamma=True)
    features = maps(*ODD[:2], channels=32, dtype=torch.float32)
    assert module.gt["p2_from_p3"](*features).abs().max() == 0
    assert module.st["p2"].output.norm.weight.min() == module.fuse["p2"].norm.weight.min() == 1


def test_dropblock_options():
    drops = block(dropblock_size=3, dropblock_prob=0.2, dropblock_ramp=9).drop
    assert list(drops) == ["p2", "p3", "p4"]
    for drop in drops.values():
        assert isinstance(drop, DropBlock)
        assert (drop.block_size, drop.drop_prob, drop.ramp) == (3, 0.2, 9)
    assert {(d.block_size, d.drop_prob, d.ramp) for d in block().drop.values()} == {(5, 0.1, 0)}


def test_dropblock_is_on_every_output_in_training_only():
    module = block(2, 64, transformers=["st"], dropblock_size=3)
    levels = maps((20, 30), (10, 15), channels=64, dtype=torch.float32)
    for out in module(levels):
        assert 0.06 < (out == 0).float().mean() < 0.14
    for out in module.eval()(levels):
        assert (out != 0).all()


@pytest.mark.parametrize("norm", ["GN", "BN", "SyncBN", ""])
@pytest.mark.parametrize("batch", [1, 2])
def test_one_step_reaches_every_parameter_but_dead_biases(norm, batch):
    """Batch norm removes the values' biases: weights sum to one, so they shift whole channels."""
    options = {"in_channels": [6, 8, 10, 12], "channels": 64, "norm": norm}
    module = build_fpt(**options, dropblock_prob=0.0).double()
    levels = [
        torch.randn(batch, c, *size).double() for c, size in zip([6, 8, 10, 12], FOUR, strict=True)
    ]
    largest = gradients(module, levels)
    dead = {name for name, value in largest.items() if value < 1e-9}
    values = {name for name in largest if name.endswith("value.bias")}
    assert len(values) == 10
    assert dead == (values if "BN" in norm else set())


def test_one_step_reaches_every_parameter_of_the_local_form():
    module = block(channels=64, norm="GN", dropblock_prob=0.0, **UFP).double()
    assert min(gradients(module, maps(*[(6, 7)] * 3, channels=64)).values()) > 1e-9


def test_images_of_a_batch_do_not_mix():
    module = lively(block(3, 32, norm="GN"))
    levels = maps(*ODD, channels=32, batch=3)
    close_all([out[1:2] for out in module(levels)], module([x[1:2] for x in levels]))


def test_memory_layout_does_not_matter():
    module, levels = lively(block()), maps(*ODD, batch=2)
    before = module(levels)
    close_all(module([x.to(memory_format=torch.channels_last) for x in levels]), before)
    close_all(module([x.mT.contiguous().mT for x in levels]), before)


@pytest.mark.parametrize("options", [{}, UFP], ids=["pyramid", "unscathed"])
def test_bfloat16_autocast(options):
    module = block(3, 32, norm="GN", dropblock_prob=0.0, **options)
    sizes = [(6, 7)] * 3 if options else FOUR[:3]
    levels = maps(*sizes, channels=32, dtype=torch.float32)
    high = module(levels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = module(levels)
        largest = gradients(module, levels)
    for a, b in zip(low, high, strict=True):
        assert (a - b).abs().max() < 0.06 * b.abs().max()
    assert all(0 < value < float("inf") for value in largest.values())


def test_neck_interface():
    module = block()
    assert (module.size_ratio, module.aux_losses()) == (4, {})
    assert block(num_levels=4).size_ratio == 8
    lateral = PyramidLateral(in_channels=[4, 4])
    lateral.aux_losses = lambda: {"loss_x": torch.ones(())}
    parts = {"st": {}, "gt": {}, "rt": {}, "fuse": {}, "drop": {}}
    necks = FeaturePyramidTransformer(channels=4, num_levels=2, lateral=lateral, **parts)
    assert list(necks.aux_losses()) == ["loss_x"]


def test_laterals_project_each_level():
    module = lively(build_fpt(in_channels=[4, 6], channels=8, transformers=[]))
    levels = [torch.randn(2, c, *size).double() for c, size in ((4, (5, 3)), (6, (2, 3)))]
    weights = module.state_dict()
    for name, x, actual in zip(("p2", "p3"), levels, module(levels), strict=True):
        close(actual[1], oracle.conv_norm(x[1], weights, f"lateral.{name}"))


def test_initial_convolutions():
    """Uniform of variance 1 / fan-in, biases zero: laterals, fusions, RT."""
    module = build_fpt(in_channels=[512] * 2, norm="GN", transformers=["rt"])
    part = module.rt["p3_from_p2"]
    convs = [module.lateral.p3.conv, module.fuse["p3"].conv, part.query.conv, part.output.conv]
    for conv in [*convs, part.value.link1.conv]:
        fan_in = conv.weight[0].numel()
        assert conv.weight.var().item() == pytest.approx(1 / fan_in, rel=0.05)
        assert conv.weight.abs().max() <= (3 / fan_in) ** 0.5
        assert conv.bias is None or conv.bias.abs().max() == 0


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"num_levels": 2}, {"num_levels": 2, **UFP}])
def test_compile_and_export_give_the_same_numbers(options):
    module = lively(block(**options, extra_level=True))
    levels = maps(*([(5, 4)] * 2 if "local_size" in options else ODD[:2]))
    torch.compiler.reset()
    close_all(torch.compile(module, fullgraph=True)(levels), module(levels))
    close_all(torch.export.export(module, (levels,)).module()(levels), module(levels))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, UFP], ids=["pyramid", "unscathed"])
def test_gpu_equals_cpu(options):
    module = lively(block(**options))
    levels = maps(*([(6, 7)] * 3 if options else ODD), batch=2)
    before = module(levels)
    close_all([out.cpu() for out in module.cuda()([x.cuda() for x in levels])], before, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"transformers": ["st", "lt"]}, ValueError, "'st', 'gt', 'rt', got 'lt'"),
        ({"pairs": "next"}, ValueError, "pairs: expected one of 'all', 'adjacent', got 'next'"),
        ({"lateral": "fpn"}, ValueError, "lateral: expected one of 'conv', 'none', got 'fpn'"),
        ({"local_size": 5}, ValueError, "local_size: .* pass same_size=True"),
        ({"local_size": 4, "same_size": True}, ValueError, "local_size: .* odd size, got 4"),
        ({"kv_pool": (2, 1)}, ValueError, r"kv_pool: expected one number or 3, .* got \[2, 1\]"),
        ({"kv_pool": 0}, ValueError, "kv_pool: expected at least 1, got 0"),
        ({"st_parts": 3}, ValueError, "got 3 and 8; use"),
        ({"rt_gate": "relu"}, ValueError, "gate: expected one of"),
        ({"norm": "GN"}, ValueError, "GN with 32 groups needs a multiple of 32 channels, got 8"),
        ({"gt_zero_gamma": True}, ValueError, "zero_gamma: expected a norm"),
        ({"dropblock_size": 4}, ValueError, "block_size: expected an odd size, got 4"),
        ({"in_channels": [8, 8, 9]}, ValueError, r"got \[8, 8, 9\]; use lateral='conv'"),
        ({"in_channels": [8], "lateral": "conv"}, ValueError, "at least two levels"),
    ],
)
def test_builder_says_what_is_wrong(options, error, text):
    options = {"in_channels": [8] * 3, "channels": 8, "norm": "", "lateral": "none", **options}
    with pytest.raises(error, match=text):
        build_fpt(**options)


def test_parts_must_fit_together():
    with pytest.raises(ValueError, match="keys of st: expected one of 'p2', .* got 'p6'"):
        marked(st={"p6": nn.Identity()})
    with pytest.raises(ValueError, match="keys of gt: .* got 'p4_from_p2'"):
        marked(gt={"p4_from_p2": nn.Identity()})
    with pytest.raises(ValueError, match="keys of rt: .* got 'p2_from_p4'"):
        marked(rt={"p2_from_p4": nn.Identity()})
    with pytest.raises(ValueError, match=r"fuse: expected one module per level, .* got \['p2'\]"):
        marked(fuse={"p2": nn.Identity()})
    with pytest.raises(ValueError, match=r"fuse: expected one module per level, .* got \[\]"):
        marked(fuse={})


def test_forward_says_what_is_wrong():
    module, levels = block(), maps(*ODD, dtype=torch.float32)
    with pytest.raises(ValueError, match="expected 3 maps, fine to coarse, got 2"):
        module(levels[:2])
    for grown in ((5, 4), (4, 6)):
        with pytest.raises(ValueError, match="fine to coarse, got .* reverse the list"):
            module(maps((4, 5), grown, (1, 1), dtype=torch.float32))
    with pytest.raises(ValueError, match=r"features\[1\]: expected 8 channels, got 4"):
        module([levels[0], levels[1][:, :4], levels[2]])
    with pytest.raises(ValueError, match="maps of one batch size"):
        module([levels[0].repeat(2, 1, 1, 1), *levels[1:]])
    with pytest.raises(TypeError, match=r"features\[0\]: .* got torch.int64"):
        check_levels([x.long() for x in levels], [8] * 3)
    with pytest.raises(ValueError, match=r"features\[0\]: expected 4 channels, got 8"):
        PointwiseLateral(in_channels=[4, 4, 4], out_channels=8)(levels)
    with pytest.raises(ValueError, match="maps of one size, got"):
        block(**UFP)(levels)


def test_level_pairs():
    assert level_pairs(3) == [(0, 1), (0, 2), (1, 2)]
    assert level_pairs(4, max_gap=1) == [(0, 1), (1, 2), (2, 3)]
    assert pair_name("p2", "p4") == "p2_from_p4"
