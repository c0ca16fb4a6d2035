"""Channel reweighting (Eq. 9)."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ctxops import ChannelAttention


def make(**changes):
    return ChannelAttention(**{"in_channels": 6, "hidden_channels": 4, **changes}).double()


def test_equals_the_equation():
    module, x = make(), torch.randn(2, 6, 3, 4, dtype=torch.float64)
    nn.init.normal_(module.norm.weight)
    for image, actual in zip(x, module(x), strict=True):
        flat = image.flatten(1)  # [C, HW]
        mask = (module.mask.weight.flatten(1) @ flat + module.mask.bias).softmax(1)
        z = flat @ mask[0]
        hidden = module.squeeze.weight @ z + module.squeeze.bias
        hidden = F.layer_norm(hidden, [4], module.norm.weight, module.norm.bias, 1e-5).relu()
        expected = 2 / (1 + (-(module.excite.weight @ hidden + module.excite.bias)).exp())
        torch.testing.assert_close(actual.flatten(), expected)


def test_zero_excitation_gives_weights_of_exactly_one():
    module, x = make(), torch.randn(2, 6, 3, 4, dtype=torch.float64)
    nn.init.zeros_(module.excite.weight)
    assert torch.equal(module(x), torch.ones(2, 6, 1, 1, dtype=torch.float64))


def test_plain_sigmoid_is_half_as_large():
    double, x = make(), torch.randn(2, 6, 3, 4, dtype=torch.float64)
    single = make(gate_scale=1.0)
    single.load_state_dict(double.state_dict())
    torch.testing.assert_close(2 * single(x), double(x))


def test_order_of_positions_and_mask_bias_do_not_matter():
    module, x = make(), torch.randn(1, 6, 3, 4, dtype=torch.float64)
    before = module(x)
    nn.init.constant_(module.mask.bias, 3.0)
    shuffled = x.flatten(2)[..., torch.randperm(12)].view(1, 6, 2, 6)
    torch.testing.assert_close(module(shuffled), before)


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match="x: expected 6 channels, got 5"):
        make()(torch.zeros(1, 5, 2, 2).double())
    with pytest.raises(ValueError, match="hidden_channels: expected at least 1, got 0"):
        make(hidden_channels=0)
