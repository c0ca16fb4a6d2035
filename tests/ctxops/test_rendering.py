"""Rendering Transformer against Eq. 6."""

import pytest
import torch
from torch import nn

from ctxops.rendering import RenderingTransformer, gate_channels
from tests.ctxops.fpt_parts import close, count, gradients, lively, maps
from tests.oracles import fpt as oracle


def tiny(gap=1, **changes):
    return RenderingTransformer(**{"channels": 4, "gap": gap, "norm": "BN", **changes})


def pair(gap, size=(9, 7), *, channels=4, **options):
    """A coarse map and the fine one `gap` levels below it."""
    coarse = tuple(-(-extent // 2**gap) for extent in size)
    return maps(coarse, size, channels=channels, **options)


def compare(module, coarse, fine, **options):
    holder = nn.Module()
    holder.m = lively(module)
    for index, actual in enumerate(module(coarse, fine)):
        image = coarse[index], fine[index]
        close(actual, oracle.rendering_transformer(*image, holder.state_dict(), "m", **options))


@pytest.mark.parametrize("norm", ["BN", ""])
@pytest.mark.parametrize("gap", [0, 1, 2, 3])
def test_equals_the_equation(gap, norm):
    compare(tiny(gap, norm=norm), *pair(gap, batch=2), stride=2 if gap else 1)


@pytest.mark.parametrize("size", [(1, 1), (1, 8), (5, 1), (6, 4)])
def test_thin_maps(size):
    compare(tiny(2), *pair(2, size))


def test_sigmoid_gate():
    compare(tiny(gate="sigmoid"), *pair(1), sigmoid=True)


def test_group_norm():
    compare(tiny(channels=32, norm="GN"), *pair(1, (5, 4), channels=32))


@pytest.mark.parametrize("gap", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [(16, 24), (13, 9), (7, 5), (1, 3)])
def test_chain_lands_on_the_size_of_the_coarse_map(gap, size):
    """Also without the interpolation: the chain itself has this size."""
    coarse, fine = pair(gap, size)
    module = lively(tiny(gap))
    assert module.value(fine).shape == coarse.shape
    assert module(coarse, fine).shape == coarse.shape


def test_other_sizes_are_interpolated():
    module, (coarse, fine) = lively(tiny(1)), maps((3, 5), (9, 8), channels=4)
    value = nn.functional.interpolate(
        module.value(fine), (3, 5), mode="bilinear", align_corners=False
    )
    rendered = module.query(gate_channels(coarse, fine))
    close(module(coarse, fine), module.output((rendered + value).relu()))
    assert tiny(0).double()(coarse, fine).shape == coarse.shape


def test_gate_is_the_mean_of_the_fine_map():
    coarse, fine = maps((2, 3), (5, 7), batch=2)
    means = fine.mean((2, 3))[:, :, None, None]
    close(gate_channels(coarse, fine), coarse * means)
    close(gate_channels(coarse, fine, gate="sigmoid"), coarse / (1 + (-means).exp()))


def test_there_is_no_norm_on_the_pooled_vector():
    """A fine map of twice the size doubles the gated query exactly."""
    coarse, fine = maps((2, 3), (5, 7))
    close(gate_channels(coarse, 2 * fine), 2 * gate_channels(coarse, fine))


@pytest.mark.parametrize("gap", [0, 1])
def test_gradcheck(gap):
    coarse, fine = pair(gap, (4, 3), channels=2)
    module = lively(tiny(gap, channels=2, norm=""))
    assert torch.autograd.gradcheck(module, (coarse.requires_grad_(), fine.requires_grad_()))


@pytest.mark.parametrize("norm", ["GN", "BN", "SyncBN", ""])
@pytest.mark.parametrize("gap", [0, 1, 3])
def test_every_parameter_gets_a_gradient_from_one_image(norm, gap):
    module = tiny(gap, channels=32, norm=norm).double()
    coarse, fine = pair(gap, (24, 17), channels=32)
    assert min(gradients(module, coarse, fine).values()) > 1e-9


def test_images_of_a_batch_do_not_mix():
    module, features = lively(tiny(channels=32, norm="GN")), pair(1, batch=3, channels=32)
    close(module(*features)[1:2], module(*[x[1:2] for x in features]))


def test_memory_layout_does_not_matter():
    module, features = lively(tiny(2)), pair(2, batch=2)
    before = module(*features)
    close(module(*[x.to(memory_format=torch.channels_last) for x in features]), before)
    close(module(*[x.mT.contiguous().mT for x in features]), before)


def test_bfloat16_autocast():
    module = tiny(2, channels=32, norm="GN")
    coarse, fine = pair(2, (16, 12), channels=32, dtype=torch.float32)
    high = module(coarse, fine)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = module(coarse, fine)
        largest = gradients(module, coarse, fine)
    assert (low - high).abs().max() < 0.06 * high.abs().max()
    assert all(0 < value < float("inf") for value in largest.values())


@pytest.mark.parametrize(
    ("gap", "expected"), [(0, 1_771_008), (1, 1_771_008), (2, 2_361_344), (3, 2_951_680)]
)
def test_number_of_parameters(gap, expected):
    with torch.device("meta"):
        assert count(tiny(gap, channels=256, norm="GN")) == expected
        assert count(tiny(gap, channels=256, norm="")) == expected - 256 * (2 + max(gap, 1))


@pytest.mark.slow
@pytest.mark.parametrize("gap", [0, 2])
def test_compile_and_export_give_the_same_numbers(gap):
    module, features = lively(tiny(gap)), tuple(pair(gap))
    torch.compiler.reset()
    close(torch.compile(module, fullgraph=True)(*features), module(*features))
    close(torch.export.export(module, features).module()(*features), module(*features))


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"gap": -1}, ValueError, "gap: expected 0 or more, got -1; swap the two maps"),
        ({"gap": 1.0}, TypeError, "gap: expected an integer, got 1.0"),
        ({"gate": "relu"}, ValueError, "gate: expected one of 'none', 'sigmoid', got 'relu'"),
        ({"norm": "GN"}, ValueError, "GN with 32 groups needs a multiple of 32 channels, got 4"),
        ({"channels": 0}, ValueError, "channels: expected at least 1, got 0"),
    ],
)
def test_constructor_says_what_is_wrong(changes, error, text):
    with pytest.raises(error, match=text):
        tiny(**changes)


def test_forward_says_what_is_wrong():
    coarse, fine = pair(1)
    with pytest.raises(ValueError, match="coarse: expected 4 channels, got 3"):
        tiny()(coarse[:, :3], fine)
    with pytest.raises(ValueError, match=r"fine: expected a non-empty map \[B, C, H, W\]"):
        tiny()(coarse, fine[0])
    with pytest.raises(ValueError, match="expected one batch size, got 1 and 2; pass two levels"):
        tiny()(coarse, fine.repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match="gate: expected one of"):
        gate_channels(coarse, fine, gate="tanh")
