"""Norms by name, convolution with norm, stochastic depth, DropBlock."""

import pytest
import torch
from torch import nn

from ctxops.drop import DropBlock, DropPath
from ctxops.norm import ConvNorm, make_norm


@pytest.mark.parametrize(
    ("norm", "kind"),
    [("", nn.Identity), ("BN", nn.BatchNorm2d), ("SyncBN", nn.SyncBatchNorm), ("GN", nn.GroupNorm)],
)
def test_norms_by_name(norm, kind):
    layer = make_norm(norm, 64)
    assert type(layer) is kind
    assert layer(torch.randn(2, 64, 3, 5)).shape == (2, 64, 3, 5)


def test_sync_norm_without_processes_is_batch_norm():
    x = torch.randn(4, 8, 3, 5)
    torch.testing.assert_close(make_norm("SyncBN", 8)(x), make_norm("BN", 8)(x))


def test_norm_errors_name_the_fix():
    with pytest.raises(ValueError, match="expected one of '', 'BN', 'SyncBN', 'GN', got 'LN'"):
        make_norm("LN", 64)
    with pytest.raises(ValueError, match=r"multiple of 32 channels, got 48; .* use 'BN'"):
        make_norm("GN", 48)


@pytest.mark.parametrize(
    ("stride", "dilation", "size"), [(1, 1, (5, 7)), (2, 1, (3, 4)), (1, 4, (5, 7))]
)
def test_conv_norm_keeps_or_divides_the_size(stride, dilation, size):
    layer = ConvNorm(
        in_channels=3, out_channels=8, kernel_size=3, stride=stride, dilation=dilation, norm="BN"
    )
    out = layer(torch.randn(2, 3, 5, 7))
    assert out.shape == (2, 8, *size)
    assert (out >= 0).all()


@pytest.mark.parametrize(
    ("norm", "bias", "expected"),
    [("", None, True), ("BN", None, False), ("BN", True, True), ("", False, False)],
)
def test_conv_norm_has_a_bias_only_where_it_counts(norm, bias, expected):
    layer = ConvNorm(in_channels=3, out_channels=8, kernel_size=1, norm=norm, bias=bias)
    assert (layer.conv.bias is not None) == expected


def test_drop_path_keeps_the_mean_and_drops_whole_images():
    drop = DropPath(drop_path_rate=0.25)
    out = drop(torch.ones(4000, 2, 3))
    assert out.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(out, out[:, :1, :1].expand_as(out))
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.75])
    x = torch.randn(2, 3)
    assert torch.equal(drop.eval()(x), x)


@pytest.mark.parametrize("size", [(h, w) for h in range(1, 10) for w in (1, 4, 9)])
def test_drop_block_works_on_any_size(size):
    x = torch.ones(200, 8, *size)
    out = DropBlock(block_size=5, drop_prob=0.1)(x)
    assert out.shape == x.shape
    assert 0.05 < (out == 0).float().mean().item() < 0.13
    assert out.mean().item() == pytest.approx(1, abs=1e-3)


def test_drop_block_drops_squares():
    torch.manual_seed(3)
    out = DropBlock(block_size=3, drop_prob=0.02)(torch.ones(50, 4, 20, 20))
    dropped = (out == 0).float()
    centres = -torch.nn.functional.max_pool2d(-dropped, 3, 1, 0)
    covered = torch.nn.functional.max_pool2d(torch.nn.functional.pad(centres, [2] * 4), 3, 1, 0)
    assert dropped.sum() > 0
    assert torch.equal(covered, dropped)


def test_drop_block_is_the_identity_in_evaluation_and_at_zero():
    x = torch.randn(2, 3, 8, 8)
    assert DropBlock(block_size=5, drop_prob=0.5).eval()(x) is x
    assert DropBlock(block_size=5, drop_prob=0.0)(x) is x


def test_drop_block_ramp_grows_and_is_resumed():
    drop = DropBlock(block_size=1, drop_prob=0.4, ramp=4)
    x = torch.ones(64, 8, 10, 10)
    fractions = [(drop(x) == 0).float().mean().item() for _ in range(6)]
    assert fractions == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4], abs=0.02)
    other = DropBlock(block_size=1, drop_prob=0.4, ramp=4)
    other.load_state_dict(drop.state_dict())
    assert other.steps.item() == 6


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"block_size": 4, "drop_prob": 0.1}, "use 3 or 5"),
        ({"block_size": 5, "drop_prob": 1.0}, r"expected a probability in \[0, 1\), got 1.0"),
        ({"block_size": 5, "drop_prob": 0.1, "ramp": -1}, "use 0 for none"),
    ],
)
def test_drop_block_errors(options, text):
    with pytest.raises(ValueError, match=text):
        DropBlock(**options)
