"""What the benchmark compares with computes the same thing."""

import pytest
import torch

from benchmarks.segtrain import CASES, Materialised
from ctxops.tokens import SelfAttention


def test_materialised_attention_is_the_same_function():
    torch.manual_seed(0)
    ours = SelfAttention(embed_dim=8, num_heads=2).double()
    other = SelfAttention(embed_dim=8, num_heads=2).double()
    other.load_state_dict(ours.state_dict())
    other.__class__ = Materialised
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    outs = [module(x) for module in (ours, other)]
    torch.testing.assert_close(outs[1], outs[0])
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in outs]
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("S")])
def test_every_layer_of_the_baseline_is_materialised(name):
    counts = {}
    for form, make in CASES[name].forms.items():
        with torch.device("meta"):
            modules = list(make().modules())
        counts[form] = sum(isinstance(m, Materialised) for m in modules)
        assert sum(isinstance(m, SelfAttention) for m in modules) == 12
    assert counts == {"materialised": 12, "ours": 0}


def test_a_training_step_trains_and_inference_does_not():
    for name in [name for name in CASES if "encoder" not in name]:
        case = CASES[name]
        with torch.device("meta"):
            training = [make().training for make in case.forms.values()]
        assert training == [case.backward] * len(case.forms), name
