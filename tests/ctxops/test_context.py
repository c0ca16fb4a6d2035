"""Collector, graph reasoning, distributor, their assembly, and the orthogonal penalty."""

import pytest
import torch
from torch import nn

from ctxops import (
    ContextCollector,
    ContextDistributor,
    GraphReasoning,
    MultiLevelContext,
    orthogonal_penalty,
)
from tests.oracles.attention import scaled_cosine_weights


def collector(**changes):
    options = {"in_channels": 6, "num_contexts": 4, "context_channels": 5, **changes}
    return ContextCollector(**options).double()


def conv1x1(layer, x):
    """W x + b for x [C, N]."""
    return layer.weight.flatten(1) @ x + layer.bias[:, None]


def feature(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_collector_equals_the_equation():
    module, x = collector(), feature(1, 6, 3, 4)
    flat = x[0].flatten(1)
    # Eq. 1 keeps the length of W_psi: it is a cosine only as far as Eq. 2 makes it one.
    logits = 6**0.5 * (module.psi.weight.flatten(1) @ (flat / flat.norm(dim=0)))
    expected = conv1x1(module.phi, flat) @ logits.softmax(1).T
    torch.testing.assert_close(module(x)[0], expected)


def test_collector_is_blind_to_the_order_of_positions():
    module, x = collector(), feature(2, 6, 3, 4)
    shuffled = x.flatten(2)[..., torch.randperm(12)].view(2, 6, 4, 3)
    torch.testing.assert_close(module(shuffled), module(x))


def test_collector_attention_is_blind_to_the_length_of_a_pixel():
    module, x = collector(), feature(1, 6, 3, 4)
    scaled = x.clone()
    scaled[..., 1, 2] *= 7.0
    torch.testing.assert_close(module.attention_logits(scaled), module.attention_logits(x))


def test_psi_bias_has_no_effect():
    module, x = collector(), feature(1, 6, 3, 4)
    before = module(x)
    nn.init.normal_(module.psi.bias)
    torch.testing.assert_close(module(x), before)
    before.square().sum().backward()
    assert module.psi.bias.grad.abs().max() < 1e-12


def test_graph_equals_the_equation():
    module, nodes = GraphReasoning(channels=8).double(), feature(1, 8, 5)
    flat = nodes[0]
    query, key = (conv1x1(layer, flat).T for layer in (module.query, module.key))
    adjacency = scaled_cosine_weights(query, key).T  # n_k x n_q as in Eq. 3
    expected = conv1x1(module.value, flat) @ adjacency + flat
    torch.testing.assert_close(module(nodes)[0], expected)


def test_graph_is_equivariant_to_the_order_of_nodes():
    module, nodes = GraphReasoning(channels=8).double(), feature(2, 8, 5)
    order = torch.randperm(5)
    torch.testing.assert_close(module(nodes[..., order]), module(nodes)[..., order])


def test_graph_is_an_identity_without_values():
    module, nodes = GraphReasoning(channels=8), torch.randn(1, 8, 5)
    nn.init.zeros_(module.value.weight)
    torch.testing.assert_close(module(nodes), nodes)


def test_graph_width_must_be_a_multiple_of_four():
    with pytest.raises(ValueError, match="expected a multiple of 4, got 6; use 8"):
        GraphReasoning(channels=6)


@pytest.mark.parametrize("normalize_query", [True, False])
def test_distributor_equals_the_equation(normalize_query):
    module = ContextDistributor(
        in_channels=6, context_channels=5, out_channels=3, normalize_query=normalize_query
    ).double()
    x, contexts = feature(1, 6, 2, 3), feature(1, 5, 7)
    flat, bank = x[0].flatten(1), contexts[0]
    query = conv1x1(module.theta, flat).T
    attention = scaled_cosine_weights(query, bank.T, normalize_query=normalize_query).T
    expected = conv1x1(module.out, bank @ attention) + conv1x1(module.xi, flat)
    torch.testing.assert_close(module(x, contexts)[0].flatten(1), expected)


def make_mgc(**changes):
    options = {
        "in_channels": [6, 8, 10],
        "out_channels": 7,
        "num_contexts": [4, 3, 2],
        "context_channels": 8,
        **changes,
    }
    return MultiLevelContext(**options)


def pyramid(dtype=torch.float64):
    return [
        torch.randn(2, c, *s, dtype=dtype)
        for c, s in zip((6, 8, 10), [(9, 7), (5, 4), (3, 2)], strict=True)
    ]


def test_mgc_keeps_sizes_and_shares_all_contexts():
    module, features = make_mgc().double(), pyramid()
    out = module(features)
    assert [tuple(x.shape) for x in out] == [(2, 7, 9, 7), (2, 7, 5, 4), (2, 7, 3, 2)]
    features[2] = features[2] + 1
    changed = module(features)
    assert all((a - b).abs().max() > 1e-6 for a, b in zip(out, changed, strict=True))


def test_mgc_contexts_follow_the_order_of_the_levels():
    module, features = make_mgc(gcn=False).double(), pyramid()
    collected = [collect(x) for collect, x in zip(module.collect.values(), features, strict=True)]
    torch.testing.assert_close(module.contexts(features), torch.cat(collected, 2))


def test_mgc_reasons_per_level_then_over_all():
    module, features = make_mgc().double(), pyramid()
    per_level = [
        module.reason[name](collect(x))
        for (name, collect), x in zip(module.collect.items(), features, strict=True)
    ]
    expected = module.reason["all"](torch.cat(per_level, 2))
    torch.testing.assert_close(module.contexts(features), expected)
    assert list(module.reason) == ["p2", "p3", "p4", "all"]
    assert len(make_mgc(gcn=False).reason) == 0


def test_penalty_of_special_weights():
    assert orthogonal_penalty(torch.eye(3, 5)) == 0
    assert orthogonal_penalty(torch.zeros(4, 6)) == 4
    # Orthonormal columns are the best that more rows than columns allow.
    columns = torch.linalg.qr(torch.randn(6, 4, dtype=torch.float64)).Q
    torch.testing.assert_close(orthogonal_penalty(columns).item(), 2.0)
    w = torch.randn(3, 4, dtype=torch.float64)
    gram = [[float(sum(a * b)) - (i == j) for j, b in enumerate(w)] for i, a in enumerate(w)]
    torch.testing.assert_close(orthogonal_penalty(w).item(), sum(v**2 for row in gram for v in row))


def test_penalty_is_float32_under_autocast():
    weight = torch.randn(4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(orthogonal_penalty(weight), orthogonal_penalty(weight.clone()))
        assert orthogonal_penalty(weight.bfloat16()).dtype == torch.float32


def test_orthogonal_loss_sums_over_levels_and_starts_at_zero():
    module = make_mgc(ortho_weight=0.5)
    assert module.aux_losses()["loss_orthogonal"] < 1e-9
    for collect in module.collect.values():
        nn.init.zeros_(collect.psi.weight)
    assert module.aux_losses()["loss_orthogonal"] == 0.5 * (4 + 3 + 2)
    assert make_mgc(ortho_weight=0.0).aux_losses() == {}


def test_orthogonal_loss_with_more_contexts_than_channels():
    module = make_mgc(num_contexts=[9, 3, 2], ortho_weight=1.0)
    loss = module.aux_losses()["loss_orthogonal"]
    torch.testing.assert_close(loss.item(), 9.0 - 6.0)
    loss.backward()
    assert module.collect["p2"].psi.weight.grad.abs().max() < 1e-5
    nn.init.normal_(module.collect["p2"].psi.weight)
    assert module.aux_losses()["loss_orthogonal"] > 3.0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_contexts": [4, 3]}, r"expected 3 numbers, one per level, got \[4, 3\]"),
        ({"in_channels": [6], "num_contexts": [4]}, "at least two levels"),
        ({"context_channels": 6}, "multiple of 4"),
        ({"num_contexts": [4, 3, 0]}, "num_contexts: expected at least 1, got 0"),
    ],
)
def test_mgc_says_what_is_wrong(options, text):
    with pytest.raises(ValueError, match=text):
        make_mgc(**options)


def test_mgc_refuses_other_pyramids():
    module, features = make_mgc(), pyramid(torch.float32)
    with pytest.raises(ValueError, match="expected 3 maps, fine to coarse, got 2"):
        module(features[:2])
    with pytest.raises(ValueError, match=r"features\[0\]: expected 6 channels, got 10"):
        module(features[::-1])
    with pytest.raises(ValueError, match=r"features\[1\] and features\[2\]: expected sizes"):
        module([*features[:2], features[2][..., :1]])
    with pytest.raises(TypeError, match=r"features\[0\]: expected a tensor .*, got ndarray"):
        module([features[0].numpy(), *features[1:]])
