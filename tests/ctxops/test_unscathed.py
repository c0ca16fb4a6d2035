"""Pyramids of equal size: global convolutions, pooling, dilation."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ctxops.unscathed import AtrousPyramid, GlobalConvolution, PoolingPyramid, UnscathedPyramid
from tests.ctxops.fpt_parts import close, count, gradients, lively, maps
from tests.oracles import fpt as oracle

PYRAMIDS = [UnscathedPyramid, PoolingPyramid, AtrousPyramid]


def tiny(pyramid, **changes):
    return pyramid(**{"in_channels": 6, "out_channels": 4, **changes})


def backbone_map(size=(9, 7), **options):
    return maps(size, channels=6, **options)[0]


@pytest.mark.parametrize("size", [(5, 4), (1, 1), (1, 6), (4, 1)])
@pytest.mark.parametrize("kernel_size", [1, 3, 7])
def test_global_convolution_equals_its_definition(kernel_size, size):
    module, (x,) = lively(GlobalConvolution(channels=3, kernel_size=kernel_size)), maps(size)
    x = x[:, :3]
    column, row = module.column_first, module.row_first
    one = oracle.conv(oracle.conv(x[0], column.first.weight), column.second.weight)
    other = oracle.conv(oracle.conv(x[0], row.first.weight), row.second.weight)
    close(module(x)[0], one + other)
    assert column.first.weight.shape[2:] == row.second.weight.shape[2:] == (kernel_size, 1)
    assert row.first.weight.shape[2:] == column.second.weight.shape[2:] == (1, kernel_size)


@pytest.mark.parametrize("rows", [1, 9, 16, 17, 33])
def test_a_long_window_on_few_rows(rows):
    """Zeros that are added and cut off again change neither the output nor the gradients."""
    module = lively(GlobalConvolution(channels=2, kernel_size=31))
    x = torch.randn(2, 2, rows, 3, dtype=torch.float64, requires_grad=True)
    plain = [
        F.conv2d(F.conv2d(x, a.weight, padding=a.padding), b.weight, padding=b.padding)
        for a, b in (module.column_first, module.row_first)
    ]
    actual, expected = module(x), plain[0] + plain[1]
    close(actual, expected)
    leaves = [x, *module.parameters()]
    noise = torch.randn_like(actual)
    wanted = torch.autograd.grad(expected, leaves, noise)
    for found, right in zip(torch.autograd.grad(actual, leaves, noise), wanted, strict=True):
        close(found, right)


def test_the_convolution_never_sees_few_rows(monkeypatch):
    """Those for which oneDNN's gradient is known to write beyond its memory."""
    seen = []
    plain = nn.Conv2d.forward
    monkeypatch.setattr(
        nn.Conv2d, "forward", lambda self, x: (seen.append(x.shape[2]), plain(self, x))[1]
    )
    for rows in (1, 10, 16, 17, 40):
        GlobalConvolution(channels=2, kernel_size=31)(torch.randn(1, 2, rows, 3))
    columns = [one for one in seen if one not in (1, 10, 16)]
    assert len(seen) == 20
    assert columns == [17] * 10 + [40] * 4


def test_unscathed_pyramid_equals_its_definition():
    module, x = lively(tiny(UnscathedPyramid, kernel_sizes=(1, 5))), backbone_map(batch=2)
    weights = module.state_dict()
    for k, actual in zip((1, 5), module(x), strict=True):
        prefix = f"branches.k{k}"
        for index in range(2):
            y = oracle.conv_norm(x[index], weights, f"{prefix}.reduce").clamp(min=0)
            y = module.branches[f"k{k}"].gcn(y[None])[0]
            close(actual[index], oracle.normalize(y, weights, f"{prefix}.norm").clamp(min=0))


def test_pooling_pyramid_equals_its_definition():
    module, x = lively(tiny(PoolingPyramid)), backbone_map((12, 6))
    for cells, actual in zip((6, 3, 2, 1), module(x), strict=True):
        pooled = F.avg_pool2d(x, (12 // cells, 6 // cells))
        y = oracle.conv_norm(pooled[0], module.state_dict(), f"branches.cells{cells}.reduce")
        y = y.clamp(min=0)[None]
        close(actual, F.interpolate(y, (12, 6), mode="bilinear", align_corners=False))


def test_atrous_pyramid_equals_its_definition():
    module, x = lively(tiny(AtrousPyramid, dilations=(2, 3))), backbone_map()
    point, *dilated = module(x)
    weights = module.state_dict()
    close(point[0], oracle.conv_norm(x[0], weights, "branches.point").clamp(min=0))
    for rate, actual in zip((2, 3), dilated, strict=True):
        prefix = f"branches.dilation{rate}"
        spread = torch.zeros(4, 6, 2 * rate + 1, 2 * rate + 1).double()
        spread[:, :, ::rate, ::rate] = weights[f"{prefix}.conv.weight"]
        y = oracle.conv(x[0], spread)
        close(actual[0], oracle.normalize(y, weights, f"{prefix}.norm").clamp(min=0))


@pytest.mark.parametrize("size", [(9, 7), (1, 1), (1, 5), (16, 16)])
@pytest.mark.parametrize("pyramid", PYRAMIDS)
def test_four_maps_of_one_size(pyramid, size):
    outputs = lively(tiny(pyramid))(backbone_map(size, batch=2))
    assert [tuple(out.shape) for out in outputs] == [(2, 4, *size)] * 4


def test_receptive_fields_grow():
    """How far a single pixel of the input is seen, level by level."""
    for pyramid, reaches in ((UnscathedPyramid, [0, 3, 7, 15]), (AtrousPyramid, [0, 12, 24, 36])):
        module = lively(tiny(pyramid, norm=""))
        x = backbone_map((1, 81)).requires_grad_()
        seen = []
        for out in module(x):
            (grad,) = torch.autograd.grad(out[..., 40].sum(), x, retain_graph=True)
            seen.append((grad.abs().sum((0, 1, 2)).nonzero() - 40).abs().max().item())
        assert seen == reaches


@pytest.mark.parametrize("norm", ["BN", "SyncBN", ""])
@pytest.mark.parametrize("pyramid", PYRAMIDS)
def test_every_parameter_gets_a_gradient(pyramid, norm):
    options = {} if pyramid is not AtrousPyramid else {"dilations": (1, 2, 3)}
    module = tiny(pyramid, norm=norm, **options).double()
    assert min(gradients(module, backbone_map((33, 33), batch=2)).values()) > 1e-9


@pytest.mark.parametrize("pyramid", PYRAMIDS)
def test_images_of_a_batch_do_not_mix(pyramid):
    module, x = lively(tiny(pyramid)), backbone_map(batch=3)
    for both, alone in zip(module(x), module(x[1:2]), strict=True):
        close(both[1:2], alone)


@pytest.mark.parametrize("pyramid", PYRAMIDS)
def test_memory_layout_does_not_matter(pyramid):
    module, x = lively(tiny(pyramid)), backbone_map(batch=2)
    before = module(x)
    close(module(x.to(memory_format=torch.channels_last)), before)
    close(module(x.mT.contiguous().mT), before)


@pytest.mark.parametrize("pyramid", PYRAMIDS)
def test_bfloat16_autocast(pyramid):
    module, x = tiny(pyramid), backbone_map(batch=4, dtype=torch.float32)
    high = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = module(x)
        largest = gradients(module, x)
    for a, b in zip(low, high, strict=True):
        # Batch norm over few values amplifies the rounding of its input.
        assert (a - b).abs().mean() < 0.05 * b.abs().mean()
    assert all(value < float("inf") for value in largest.values())


def test_global_convolution_gradcheck():
    module, (x,) = lively(GlobalConvolution(channels=2, kernel_size=3)), maps((4, 3), channels=2)
    assert torch.autograd.gradcheck(module, x.requires_grad_())


def test_numbers_of_parameters():
    with torch.device("meta"):
        module = UnscathedPyramid(in_channels=2048)
        assert count(module) == 16_257_024
        reduces = [count(branch.reduce.conv) for branch in module.branches.values()]
        assert sum(reduces) == 2_097_152
        gcns = [count(branch.gcn) for branch in module.branches.values()]
        assert gcns == [262_144 * k for k in (1, 7, 15, 31)]
        assert count(PoolingPyramid(in_channels=2048)) == 4 * (2048 * 256 + 512)
        assert count(AtrousPyramid(in_channels=2048)) == 28 * 2048 * 256 + 4 * 512


def test_initial_convolutions():
    module = tiny(UnscathedPyramid, in_channels=2048, out_channels=256, kernel_sizes=(7,))
    branch = module.branches["k7"]
    for conv in (branch.reduce.conv, *branch.gcn.column_first, *branch.gcn.row_first):
        fan_in = conv.weight[0].numel()
        assert conv.weight.var().item() == pytest.approx(1 / fan_in, rel=0.05)
        assert isinstance(conv, nn.Conv2d)


@pytest.mark.parametrize(
    ("pyramid", "keys"),
    [
        (UnscathedPyramid, ["k1", "k7", "k15", "k31"]),
        (PoolingPyramid, ["cells6", "cells3", "cells2", "cells1"]),
        (AtrousPyramid, ["point", "dilation12", "dilation24", "dilation36"]),
    ],
)
def test_keys_name_branches(pyramid, keys):
    with torch.device("meta"):
        module = tiny(pyramid)
    assert list(dict.fromkeys(key.split(".")[1] for key in module.state_dict())) == keys
    assert not any(part.isdigit() for key in module.state_dict() for part in key.split("."))


@pytest.mark.slow
@pytest.mark.parametrize("pyramid", PYRAMIDS)
def test_compile_and_export_give_the_same_numbers(pyramid):
    module, x = lively(tiny(pyramid)), backbone_map()
    torch.compiler.reset()
    for a, b in zip(torch.compile(module, fullgraph=True)(x), module(x), strict=True):
        close(a, b)
    for a, b in zip(torch.export.export(module, (x,)).module()(x), module(x), strict=True):
        close(a, b)


@pytest.mark.parametrize(
    ("pyramid", "changes", "error", "text"),
    [
        (UnscathedPyramid, {"kernel_sizes": (1, 6)}, ValueError, "odd size, got 6; use 5 or 7"),
        (UnscathedPyramid, {"out_channels": 0}, ValueError, "out_channels: expected at least"),
        (UnscathedPyramid, {"norm": "LN"}, ValueError, "norm: expected one of"),
        (PoolingPyramid, {"cells": (0,)}, ValueError, "cells: expected at least 1, got 0"),
        (AtrousPyramid, {"dilations": (1.5,)}, TypeError, "dilations: expected an integer, got"),
    ],
)
def test_constructor_says_what_is_wrong(pyramid, changes, error, text):
    with pytest.raises(error, match=text):
        tiny(pyramid, **changes)


@pytest.mark.parametrize("pyramid", PYRAMIDS)
def test_forward_says_what_is_wrong(pyramid):
    with pytest.raises(ValueError, match="x: expected 6 channels, got 5"):
        tiny(pyramid)(torch.zeros(1, 5, 4, 4))
