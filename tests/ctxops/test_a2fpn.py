"""The assembled neck: paths, ablations, sizes, gradients, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from ctxops import A2FPN, ConvLateral, build_a2fpn_lite
from tests.ctxops.necks import FPN, IN_CHANNELS, LITE, PAFPN, halved, pyramid, step, tiny_neck

# Tables 2 to 5 of the paper, on its PAFPN base.
ABLATIONS = {
    "fpn": FPN,
    "pafpn": PAFPN,
    "mgc": {**PAFPN, "lateral": "mgc"},
    "gacarafe": {**PAFPN, "top_down": "gacarafe"},
    "gacap": {**PAFPN, "bottom_up": "gacap"},
    "mgc_gacarafe": {**PAFPN, "lateral": "mgc", "top_down": "gacarafe"},
    "mgc_gacap": {**PAFPN, "lateral": "mgc", "bottom_up": "gacap"},
    "gacarafe_gacap": {**PAFPN, "top_down": "gacarafe", "bottom_up": "gacap"},
    "full": {},
    "lite": LITE,
    "full_no_gcn": {"gcn": False},
    "mgc_no_gcn": {**PAFPN, "lateral": "mgc", "gcn": False},
    "carafe": {**PAFPN, "top_down": "carafe"},
    "cap": {**PAFPN, "bottom_up": "cap"},
    "contexts_rising": {"num_contexts": [2, 3, 4, 5]},
    "contexts_flat": {"num_contexts": [3, 3, 3, 3]},
    "gacarafe_sigmoid": {**PAFPN, "top_down": "gacarafe", "gate": "sigmoid"},
    "gacap_sigmoid": {**PAFPN, "bottom_up": "gacap", "gate": "sigmoid"},
    "literal_eq3": {"normalize_query": False},
    "full_no_bottom_up": {"bottom_up": "none"},
    "small_kernels": {"kernel_up": 3, "kernel_down": 3, "kernel_encoder": 1, "ortho_weight": 0.0},
}
# A constant added to all logits of a softmax over positions changes nothing.
DEAD = (".psi.bias", ".attention.mask.bias")


def live_kernels(neck):
    """Predicted kernels that differ from pixel to pixel, unlike the initial ones."""
    for name, parameter in neck.named_parameters():
        if name.endswith("predict.weight"):
            nn.init.normal_(parameter, std=0.3)
    return neck


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_builds_and_trains(name):
    neck, size = live_kernels(tiny_neck(**ABLATIONS[name])), (16, 24)
    outputs = step(neck, pyramid(size, batch=2))
    expected = [(2, 8, *halved(size, level)) for level in range(5)]
    assert [tuple(out.shape) for out in outputs] == expected
    for key, parameter in neck.named_parameters():
        assert parameter.grad is not None, f"{key} has no gradient"
        largest = parameter.grad.abs().max().item()
        if key.endswith(DEAD):
            assert largest < 1e-3, f"{key} should be without effect"
        else:
            assert largest > 1e-7, f"{key} has a zero gradient"


@pytest.mark.parametrize(
    ("options", "size"),
    [({}, (26, 38)), (LITE, (25, 38)), ({}, (9, 5)), (LITE, (1, 3)), ({**FPN}, (13, 7))],
)
def test_odd_sizes_round_up(options, size):
    outputs = step(tiny_neck(**options), pyramid(size))
    assert [tuple(out.shape[-2:]) for out in outputs] == [halved(size, n) for n in range(5)]


@pytest.mark.parametrize(("options", "ratio"), [({}, 16), (LITE, 8), (FPN, 8), (PAFPN, 8)])
def test_size_ratio_makes_resampling_exact(options, ratio):
    neck = tiny_neck(**options)
    assert neck.size_ratio == ratio
    sizes = [out.shape[-2:] for out in neck(pyramid((ratio, 2 * ratio)))]
    in_paths = sizes if neck.extra_level is not None else sizes[:-1]
    for fine, coarse in zip(in_paths, in_paths[1:], strict=False):
        assert tuple(fine) == tuple(2 * extent for extent in coarse)


@pytest.mark.parametrize("levels", [2, 3, 5])
@pytest.mark.parametrize("extra_level", ["conv", "maxpool"])
def test_other_numbers_of_levels(levels, extra_level):
    channels = (8, 12, 16, 24, 32)[:levels]
    neck = tiny_neck(in_channels=channels, num_contexts=None, extra_level=extra_level)
    outputs = step(neck, pyramid((16, 24), channels=channels))
    assert len(outputs) == levels + 1
    assert neck.size_ratio == 2 ** (levels - (extra_level == "maxpool"))
    counts = [collect.psi.out_channels for collect in neck.lateral.collect.values()]
    assert counts == [64 * (levels - level) for level in range(levels)]


def test_lite_is_the_documented_setting():
    neck = build_a2fpn_lite(in_channels=IN_CHANNELS, out_channels=8)
    counts = [collect.psi.out_channels for collect in neck.lateral.collect.values()]
    assert counts == [128, 96, 64, 32]
    assert neck.lateral.collect["p2"].phi.out_channels == 128
    assert (list(neck.output_td), list(neck.output_bu)) == (
        ["p2", "p3", "p4", "p5"],
        ["p3", "p4", "p5"],
    )
    outputs = neck(pyramid())
    assert torch.equal(outputs[4], outputs[3][..., ::2, ::2])


def test_fpn_equals_torchvision():
    ours = tiny_neck(**FPN)
    theirs = FeaturePyramidNetwork(list(IN_CHANNELS), 8, extra_blocks=LastLevelMaxPool())
    for level, name in enumerate(("p2", "p3", "p4", "p5")):
        theirs.inner_blocks[level][0].load_state_dict(getattr(ours.lateral, name).state_dict())
        theirs.layer_blocks[level][0].load_state_dict(ours.output_td[name].state_dict())
    features = pyramid()
    expected = theirs({str(level): x for level, x in enumerate(features)})
    torch.testing.assert_close(ours(features), list(expected.values()))


def test_pafpn_equals_its_definition():
    neck, features = tiny_neck(**PAFPN), pyramid((13, 18))
    merged = neck.lateral(features)
    for level in (2, 1, 0):
        size = merged[level].shape[-2:]
        up = F.interpolate(merged[level + 1], scale_factor=2, mode="nearest")
        merged[level] = merged[level] + up[..., : size[0], : size[1]]
    merged = [conv(x) for conv, x in zip(neck.output_td.values(), merged, strict=True)]
    for level, name in enumerate(("p3", "p4", "p5"), start=1):
        merged[level] = merged[level] + neck.bottom_up[name].resample(merged[level - 1])
    expected = [merged[0]]
    expected += [conv(x) for conv, x in zip(neck.output_bu.values(), merged[1:], strict=True)]
    expected.append(expected[-1][..., ::2, ::2])
    torch.testing.assert_close(neck(features), expected)


def test_full_model_equals_its_definition():
    neck, features = live_kernels(tiny_neck()), pyramid((18, 21))
    merged = [*neck.lateral(features), neck.extra_level(features[-1])]
    for level, name in ((3, "p5"), (2, "p4"), (1, "p3"), (0, "p2")):
        merged[level] = neck.top_down[name](merged[level + 1], merged[level])
    merged = [conv(x) for conv, x in zip(neck.output_td.values(), merged, strict=True)]
    for level, name in enumerate(("p3", "p4", "p5", "p6"), start=1):
        merged[level] = neck.bottom_up[name](merged[level - 1], merged[level])
    expected = [conv(x) for conv, x in zip(neck.output_bu.values(), merged, strict=True)]
    torch.testing.assert_close(neck(features), expected)


def changed_levels(neck, features, change):
    before = neck(features)
    change()
    after = neck(features)
    return [bool((a - b).abs().max() > 1e-7) for a, b in zip(before, after, strict=True)]


@torch.no_grad()
def test_extra_level_feeds_every_output():
    neck = live_kernels(tiny_neck())
    assert changed_levels(neck, pyramid(), lambda: neck.extra_level.bias.add_(1.0)) == [True] * 5


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, LITE, FPN])
def test_coarsest_feature_feeds_every_output(options):
    neck, features = live_kernels(tiny_neck(**options)), pyramid()
    assert changed_levels(neck, features, lambda: features[-1].add_(1.0)) == [True] * 5


@torch.no_grad()
def test_without_bottom_up_path_the_finest_feature_stays_fine():
    neck, features = tiny_neck(**FPN), pyramid()
    changed = changed_levels(neck, features, lambda: features[0].add_(1.0))
    assert changed == [True, False, False, False, False]


def test_images_of_a_batch_do_not_mix():
    neck, features = live_kernels(tiny_neck()), pyramid(batch=2)
    together = neck(features)
    alone = neck([x[1:] for x in features])
    for both, one in zip(together, alone, strict=True):
        torch.testing.assert_close(both[1:], one, rtol=1e-4, atol=1e-5)


def test_reassembly_methods_agree():
    chunked = live_kernels(tiny_neck())
    loop = tiny_neck(reassembly="loop")
    loop.load_state_dict(chunked.state_dict())
    features = pyramid()
    torch.testing.assert_close(chunked(features), loop(features), rtol=1e-4, atol=1e-5)


def test_aux_losses():
    assert tiny_neck(lateral="conv").aux_losses() == {}
    assert tiny_neck(ortho_weight=0.0).aux_losses() == {}
    neck = tiny_neck()
    for collect in neck.lateral.collect.values():
        nn.init.zeros_(collect.psi.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = neck.aux_losses()
    assert list(losses) == ["loss_orthogonal"]
    assert losses["loss_orthogonal"].dtype == torch.float32
    assert losses["loss_orthogonal"].item() == pytest.approx(1e-4 * (5 + 4 + 3 + 2))


@pytest.mark.parametrize("options", [{}, LITE, ABLATIONS["carafe"], ABLATIONS["cap"]])
def test_bfloat16_autocast(options):
    neck, features = live_kernels(tiny_neck(**options)), pyramid()
    expected = neck(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = step(neck, features)
    assert {out.dtype for out in outputs} == {torch.bfloat16}
    for low, high in zip(outputs, expected, strict=True):
        assert (low - high).abs().max() < 0.08 * high.abs().max()
    assert all(torch.isfinite(p.grad).all() for p in neck.parameters())


def test_state_dict_survives_a_round_trip():
    source, target, features = tiny_neck(), tiny_neck(), pyramid()
    target.load_state_dict(source.state_dict())
    torch.testing.assert_close(target(features), source(features))


def test_export_gives_the_same_numbers():
    neck, features = live_kernels(tiny_neck(**LITE)), pyramid((8, 8))
    program = torch.export.export(neck, (features,))
    exported = program.module()(features)
    torch.testing.assert_close(exported, neck(features), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compile_gives_the_same_numbers():
    neck, features = live_kernels(tiny_neck()), pyramid((16, 16))
    compiled = torch.compile(neck, fullgraph=True)
    torch.testing.assert_close(compiled(features), neck(features), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_gpu_equals_cpu():
    neck, features = live_kernels(tiny_neck()).double(), pyramid(dtype=torch.float64)
    expected = neck(features)
    outputs = neck.cuda()([x.cuda() for x in features])
    for gpu, cpu in zip(outputs, expected, strict=True):
        torch.testing.assert_close(gpu.cpu(), cpu, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"lateral": "mcg"}, ValueError, "lateral: expected one of 'mgc', 'conv', got 'mcg'"),
        ({"top_down": "bilinear"}, ValueError, "'gacarafe', 'carafe', 'nearest'"),
        ({"bottom_up": "pool"}, ValueError, "'gacap', 'cap', 'conv', 'none'"),
        ({"gate": "tanh"}, ValueError, "'2sigmoid', 'sigmoid', got 'tanh'"),
        ({"extra_level": "none"}, ValueError, "'conv', 'maxpool'"),
        ({"reassembly": "cuda"}, ValueError, "'loop', 'chunked', 'triton', got 'cuda'"),
        ({"in_channels": [8]}, ValueError, "at least two levels"),
        ({"in_channels": [8, 0]}, ValueError, "in_channels: expected at least 1, got 0"),
        ({"num_contexts": [4]}, ValueError, "expected 4 numbers, one per level"),
        ({"out_channels": 8.0}, TypeError, "out_channels: expected an integer, got 8.0"),
        ({"kernel_up": 4}, ValueError, "expected an odd size, got 4; use 3 or 5"),
        ({"context_channels": 6}, ValueError, "expected a multiple of 4, got 6; use 8"),
    ],
)
def test_builder_says_what_is_wrong(options, error, text):
    with pytest.raises(error, match=text):
        tiny_neck(**options)


def test_forward_says_what_is_wrong():
    neck, features = tiny_neck(), pyramid()
    with pytest.raises(ValueError, match="expected 4 maps, fine to coarse, got 3"):
        neck(features[:3])
    with pytest.raises(ValueError, match=r"features\[0\]: expected 8 channels, got 24"):
        neck(features[::-1])


def test_parts_must_fit_together():
    lateral = ConvLateral(in_channels=[4, 4], out_channels=4)
    parts = [nn.Identity(), nn.Identity()]
    with pytest.raises(ValueError, match=r"A2FPN with 2 levels .* got \(1, 1, 0, 0\)"):
        A2FPN(lateral=lateral, top_down=parts[:1], output_td=parts[:1])
    with pytest.raises(ValueError, match=r"A2FPN with 3 levels .* got \(1, 2, 0, 0\)"):
        A2FPN(lateral=lateral, top_down=parts[:1], output_td=parts, extra_level=parts[0])
