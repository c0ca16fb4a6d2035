"""Merging neighbouring levels, and the resampling layers it is built from."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ctxops import (
    ChannelAttention,
    ContentAwarePool,
    ContentAwareUp,
    GuidedBottomUp,
    GuidedTopDown,
    KernelPredictor,
    SumFusion,
)
from tests.oracles import reassembly as oracle

WIDTH = 4
FINE, COARSE = (7, 10), (4, 5)


def predictor(**changes):
    options = {"in_channels": 2 * WIDTH, "kernel_size": 3, "reduction_channels": 6, **changes}
    module = KernelPredictor(**options)
    nn.init.normal_(module.predict.weight)  # the tiny initial weights would hide mistakes
    return module.double()


def attention():
    return ChannelAttention(in_channels=2 * WIDTH, hidden_channels=3).double()


def feature(size, channels=WIDTH):
    return torch.randn(1, channels, *size, dtype=torch.float64)


def top_down():
    resample = ContentAwareUp(predictor=predictor(scale=2))
    return GuidedTopDown(resample=resample, attention=attention())


def bottom_up():
    resample = ContentAwarePool(predictor=predictor(stride=2))
    return GuidedBottomUp(resample=resample, attention=attention())


def test_predictor_layers_and_initial_kernels():
    module = KernelPredictor(in_channels=8, kernel_size=5, scale=2)
    convolutions = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size[0]) for c in convolutions] == [
        (8, 64, 1),
        (64, 64, 3),
        (64, 100, 3),
    ]
    assert sum(isinstance(layer, nn.ReLU) for layer in module.modules()) == 1
    kernels = module(torch.randn(1, 8, 4, 5))
    assert kernels.shape == (1, 25, 4, 4, 5)
    assert (kernels - 1 / 25).abs().max() < 0.01


def test_predictor_has_one_activation_after_the_middle_convolution():
    module, guide = predictor(scale=2), feature(COARSE, 2 * WIDTH)
    middle = F.conv2d(
        module.reduce(guide), module.blend.conv0.weight, module.blend.conv0.bias, padding=1
    )
    logits = F.conv2d(middle.relu(), module.predict.weight, module.predict.bias, padding=1)
    expected = oracle.to_subpixels(oracle.softmax_over_taps(logits, 3, 2), 2)
    torch.testing.assert_close(module(guide), expected)


def test_predictor_strides_in_its_last_convolution():
    kernels = predictor(stride=2)(feature(FINE, 2 * WIDTH))
    assert kernels.shape == (1, 9, 1, *COARSE)


def test_resampling_predicts_from_the_map_itself_without_a_guide():
    x = feature(COARSE)
    up = ContentAwareUp(predictor=predictor(in_channels=WIDTH, scale=2, num_blends=0))
    pool = ContentAwarePool(predictor=predictor(in_channels=WIDTH, stride=2))
    torch.testing.assert_close(up(x), up(x, x))
    torch.testing.assert_close(pool(x), pool(x, x))


def test_top_down_equals_the_equations():
    module, coarse, fine = top_down(), feature(COARSE), feature(FINE)
    guide = torch.cat([coarse, F.max_pool2d(fine, 2, ceil_mode=True)], 1)
    kernels = F.pixel_shuffle(module.resample.predictor(guide).flatten(1, 2), 2)
    up = oracle.reassemble(coarse, kernels, scale=2)[..., : FINE[0], : FINE[1]]
    weights = module.attention(guide)
    expected = weights[:, :WIDTH] * up + weights[:, WIDTH:] * fine
    torch.testing.assert_close(module(coarse, fine), expected)


def test_bottom_up_equals_the_equations():
    module, fine, coarse = bottom_up(), feature(FINE), feature(COARSE)
    enlarged = F.interpolate(coarse, size=FINE, mode="bilinear", align_corners=False)
    guide = torch.cat([fine, enlarged], 1)
    down = oracle.reassemble(fine, module.resample.predictor(guide).squeeze(2), stride=2)
    weights = module.attention(guide)
    expected = weights[:, :WIDTH] * coarse + weights[:, WIDTH:] * down
    torch.testing.assert_close(module(fine, coarse), expected)


def test_neutral_gates_leave_a_plain_sum():
    coarse, fine = feature(COARSE), feature(FINE)
    down, up = top_down(), bottom_up()
    for module in (down, up):
        nn.init.zeros_(module.attention.excite.weight)
    guide = torch.cat([coarse, F.max_pool2d(fine, 2, ceil_mode=True)], 1)
    upsampled = down.resample(coarse, guide)[..., : FINE[0], : FINE[1]]
    torch.testing.assert_close(down(coarse, fine), upsampled + fine)
    enlarged = F.interpolate(coarse, size=FINE, mode="bilinear", align_corners=False)
    pooled = up.resample(fine, torch.cat([fine, enlarged], 1))
    torch.testing.assert_close(up(fine, coarse), coarse + pooled)


def test_plain_sum_crops_to_the_target():
    coarse, fine = feature(COARSE), feature(FINE)
    step = SumFusion(resample=nn.Upsample(scale_factor=2.0, mode="nearest"))
    out = step(coarse, fine)
    for row, column in ((0, 0), (3, 9), (6, 5)):
        expected = coarse[..., row // 2, column // 2] + fine[..., row, column]
        torch.testing.assert_close(out[..., row, column], expected)


def plain_sum():
    return SumFusion(resample=nn.Upsample(scale_factor=2.0))


@pytest.mark.parametrize(
    ("make", "sizes"),
    [
        (top_down, [(3, 5), FINE]),
        (top_down, [FINE, COARSE]),
        (bottom_up, [FINE, (3, 5)]),
        (bottom_up, [COARSE, FINE]),
        (plain_sum, [(3, 5), FINE]),
        (plain_sum, [FINE, (5, 5)]),
    ],
)
def test_steps_refuse_maps_that_are_no_neighbours(make, sizes):
    with pytest.raises(ValueError, match=r"the coarser one half the finer one \(rounded up\): "):
        make()(*(feature(size) for size in sizes))


@pytest.mark.parametrize(
    ("make", "sizes"),
    [(top_down, [COARSE, FINE]), (bottom_up, [FINE, COARSE]), (plain_sum, [COARSE, FINE])],
)
def test_steps_refuse_maps_of_different_widths(make, sizes):
    with pytest.raises(ValueError, match=r"coarser map: expected \d channels, got \d"):
        make()(feature(sizes[0]), feature(sizes[1], 3))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: KernelPredictor(in_channels=8, kernel_size=4),
            "kernel_size: expected an odd size, got 4; use 3 or 5",
        ),
        (lambda: KernelPredictor(in_channels=8, kernel_size=3, kernel_encoder=2), "kernel_encoder"),
        (lambda: ContentAwareUp(predictor=nn.Identity(), reassembly="quick"), "got 'quick'"),
        (lambda: ContentAwarePool(predictor=nn.Identity(), reassembly="quick"), "got 'quick'"),
    ],
)
def test_layers_say_what_is_wrong(make, text):
    with pytest.raises(ValueError, match=text):
        make()
