"""Global context blocks and attention augmented convolutions against loops over positions."""

import pytest
import torch
from torch import nn

from ctxops.heads.augmented_conv import AugmentedConv, augmented_attention
from ctxops.heads.global_context import GlobalContext, attentive_pool
from tests.oracles import backbone_blocks as oracle

SIZES = [(4, 5), (3, 3), (1, 1), (1, 4), (5, 1)]
KINDS = ("gc", "aa", "aa_strided")


def make(kind="gc", channels=8, **options):
    torch.manual_seed(0)
    if kind == "gc":
        module = GlobalContext(in_channels=channels, reduction=2)
    else:
        sizes = {"out_channels": 6, "key_channels": 6, "value_channels": 4, "num_heads": 2}
        stride = 2 if kind == "aa_strided" else 1
        options = {"max_distance": 2, "stride": stride, **sizes, **options}
        module = AugmentedConv(in_channels=channels, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    if kind == "gc":
        nn.init.uniform_(module.norm.weight, 0.5, 1.5)
        nn.init.uniform_(module.norm.bias, 0.0, 0.5)  # some of what ReLU sees is positive
    return module.double()


def features(height, width, batch=2, channels=8):
    generator = torch.Generator().manual_seed(height * 31 + width)
    shape = (batch, channels, height, width)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def expected(kind, x, module):
    state = module.state_dict()
    if kind == "gc":
        return oracle.global_context(x, state)
    stride = 2 if kind == "aa_strided" else 1
    return oracle.augmented_conv(x, state, heads=2, key_channels=6, stride=stride)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_equations(kind, size):
    module, x = make(kind), features(*size)
    found = module(x)
    for image, out in zip(x, found, strict=True):
        torch.testing.assert_close(out, expected(kind, image, module))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    module, x = make(kind), features(3, 4, batch=1).requires_grad_()
    assert torch.autograd.gradcheck(module, (x,))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind):
    module = make(kind, max_distance=3) if kind != "gc" else make(kind)
    module(features(7, 8)).square().sum().backward()
    assert all(p.grad.abs().max() > 1e-8 for p in module.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_independent_and_strides_do_not_matter(kind):
    module, x = make(kind), features(5, 4)
    alone = torch.cat([module(image[None]) for image in x])
    torch.testing.assert_close(module(x), alone)
    torch.testing.assert_close(module(x.to(memory_format=torch.channels_last)), alone)
    torch.testing.assert_close(module(x.transpose(2, 3).contiguous().transpose(2, 3)), alone)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast(kind):
    module, x = make(kind).float(), features(6, 5).float()
    high = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = module(x)
        low.float().square().sum().backward()
    # bfloat16 has 8 bits; a few roundings in a row
    assert (low - high).abs().max() < 0.05 * high.abs().max()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_global_context_starts_as_identity():
    module, x = GlobalContext(in_channels=16, reduction=2), features(3, 4, channels=16).float()
    assert torch.equal(module(x), x)


def test_pooling_is_a_mean_and_sees_every_position():
    x = features(3, 4)
    logits = torch.zeros(2, 1, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(attentive_pool(x, logits), x.mean((2, 3)))
    logits[:, :, 1, 2] = 1e4
    torch.testing.assert_close(attentive_pool(x, logits), x[:, :, 1, 2])


def test_attention_without_positions_does_not_know_where_things_are():
    x, none = features(3, 4, channels=4)[:, None], torch.zeros(3, 4, dtype=torch.float64)
    out = augmented_attention(x, x, x, none, none)
    flipped = augmented_attention(x.flip(3), x.flip(3), x.flip(3), none, none)
    torch.testing.assert_close(out, flipped.flip(3))
    rows = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = augmented_attention(x.flip(3), x.flip(3), x.flip(3), rows, none)
    assert (augmented_attention(x, x, x, rows, none) - moved.flip(3)).abs().max() > 1e-3


def test_rows_and_columns_are_not_mixed_up():
    x = features(3, 4, channels=4)[:, None]
    none = torch.zeros(5, 4, dtype=torch.float64)
    some = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = x.transpose(3, 4)
    out = augmented_attention(x, x, x, some, none)
    other = augmented_attention(turned, turned, turned, none, some)
    torch.testing.assert_close(out, other.transpose(3, 4))


def test_parameters():
    count = sum(p.numel() for p in GlobalContext(in_channels=512, reduction=16).parameters())
    assert count == 512 + 2 * 512 * 32 + 32 + 512 + 2 * 32
    module = AugmentedConv(in_channels=64, out_channels=64, key_channels=160, value_channels=8)
    count = sum(p.numel() for p in module.parameters())
    assert count == 9 * 64 * 56 + 64 * 328 + 8 * 8 + 2 * 129 * 20


def test_names():
    assert list(GlobalContext(in_channels=32).state_dict()) == [
        "mask.weight", "reduce.weight", "reduce.bias", "norm.weight", "norm.bias",
        "expand.weight", "expand.bias",
    ]  # fmt: skip
    assert list(make("aa").state_dict()) == [
        "rows", "columns", "conv.weight", "qkv.weight", "out.weight",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value_channels": 6}, r"value_channels: expected 1 .. 5 for 6 output channels, got 6"),
        ({"key_channels": 7}, "num_heads and key_channels: .* got 2 and 7"),
        ({"value_channels": 3}, "num_heads and value_channels: .* got 2 and 3"),
        ({"kernel_size": 2}, "kernel_size: expected an odd size"),
        ({"max_distance": 0}, "max_distance: expected at least 1"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make("aa", **options)


def test_other_errors():
    with pytest.raises(ValueError, match="reduction and in_channels: .* got 3 and 8; use 2"):
        GlobalContext(in_channels=8, reduction=3)
    with pytest.raises(ValueError, match="reduction: expected at most half of the 8 channels"):
        GlobalContext(in_channels=8, reduction=8)
    for kind in KINDS:
        with pytest.raises(ValueError, match="expected 8 channels, got 4"):
            make(kind)(features(2, 2, channels=4))
        with pytest.raises(TypeError, match="floating point"):
            make(kind)(features(2, 2).long())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_and_exports(kind):
    module, x = make(kind).float(), features(6, 5).float()
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), module(x))
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), module(x))
