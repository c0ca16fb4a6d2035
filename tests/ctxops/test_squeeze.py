"""Pooling to a vector and the ways to reason over its nodes."""

import pytest
import torch
from torch import nn

from ctxops.squeeze import (
    NodeAttention,
    NodeFC,
    NodeGraph,
    average_pool,
    hadamard_pool,
    make_node_norm,
    node_attention,
)
from tests.oracles import squeeze as oracle

EXACT = {"rtol": 0, "atol": 1e-12}


def randomized(module):
    """Every parameter and statistic away from its start; double precision, evaluation mode."""
    for tensor in module.parameters():
        nn.init.normal_(tensor)
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point():
            nn.init.uniform_(buffer, 0.5, 1.5) if name.endswith("var") else nn.init.normal_(buffer)
    return module.double().eval()


# ---- pooling -----------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(3, 5), (1, 1), (1, 4)])
def test_pooling_equals_the_equation(size):
    b, c = torch.randn(2, 2, 3, *size, dtype=torch.float64)
    expected = torch.zeros(2, 3, dtype=torch.float64)
    mean = torch.zeros(2, 3, dtype=torch.float64)
    for y in range(size[0]):
        for x in range(size[1]):
            expected += b[:, :, y, x] * c[:, :, y, x]
            mean += b[:, :, y, x] / (size[0] * size[1])
    torch.testing.assert_close(hadamard_pool(b, c, pool="sum"), expected, **EXACT)
    torch.testing.assert_close(hadamard_pool(b, c), expected / (size[0] * size[1]), **EXACT)
    torch.testing.assert_close(average_pool(b), mean, **EXACT)


def test_ghp_is_the_diagonal_of_bilinear_pooling():
    b, c = torch.randn(2, 2, 4, 3, 5, dtype=torch.float64)
    outer = b.flatten(2) @ c.flatten(2).transpose(1, 2)
    diagonal = outer.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(hadamard_pool(b, c, pool="sum"), diagonal, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pooling_of_half_precision_is_in_float32(dtype):
    b, c = (300 * torch.randn(2, 1, 3, 40, 50)).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled, mean = hadamard_pool(b, c), average_pool(b)
    assert pooled.dtype == mean.dtype == torch.float32
    expected = (b.double() * c.double()).mean((2, 3))
    torch.testing.assert_close(pooled.double(), expected, rtol=0, atol=0.1)
    torch.testing.assert_close(mean.double(), b.double().mean((2, 3)), rtol=0, atol=1e-3)


def test_pooling_gradcheck():
    b, c = torch.randn(2, 2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    for pool in ("mean", "sum"):
        assert torch.autograd.gradcheck(lambda b, c, p=pool: hadamard_pool(b, c, pool=p), (b, c))


def test_pooling_says_what_is_wrong():
    x = torch.zeros(1, 2, 3, 3)
    with pytest.raises(ValueError, match="pool: expected one of 'mean', 'sum', got 'max'"):
        hadamard_pool(x, x, pool="max")
    with pytest.raises(ValueError, match=r"one shape, got \(1, 2, 3, 3\) and \(1, 2, 3, 2\)"):
        hadamard_pool(x, x[..., :2])
    with pytest.raises(TypeError, match="b: expected a floating point map, got torch.int64"):
        hadamard_pool(x.long(), x)
    with pytest.raises(ValueError, match=r"x: expected a non-empty map .* got shape \(2, 3, 3\)"):
        average_pool(x[0])


# ---- reasoning ---------------------------------------------------------------------------------
@pytest.mark.parametrize("adj", ["paper", "released"])
@pytest.mark.parametrize("norm", ["BN", "SyncBN", "LN", ""])
@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 5, 2), (2, 1, 1)])
def test_graph_equals_the_equation(shape, norm, adj):
    part = randomized(NodeGraph(nodes=shape[1], features=shape[2], norm=norm, adj=adj))
    nodes = torch.randn(shape, dtype=torch.float64)
    expected = torch.stack([oracle.graph(g, part.state_dict(), adj=adj) for g in nodes])
    torch.testing.assert_close(part(nodes), expected, **EXACT)


def test_graph_without_norm_is_the_literal_equation():
    """ReLU(W_g G (I - A_g)) with nodes as columns."""
    part = randomized(NodeGraph(nodes=4, features=3, norm=""))
    columns = torch.randn(3, 4, dtype=torch.float64)
    laplacian = torch.eye(4) - part.adjacency.weight[..., 0].t()
    expected = (part.transform.weight[..., 0] @ columns @ laplacian).relu()
    torch.testing.assert_close(part(columns.t()[None])[0].t(), expected, **EXACT)


def test_layer_norm_of_nodes_has_one_set_of_statistics_per_image():
    nodes = torch.randn(3, 4, 2)
    out = make_node_norm("LN", 4)(nodes)
    torch.testing.assert_close(out.mean((1, 2)), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(out.var((1, 2), correction=0), torch.ones(3), rtol=0, atol=1e-3)
    assert out.abs().sub(1).abs().min() > 1e-3, "features alone would be normalised to signs"


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 5, 2), (2, 1, 1)])
def test_attention_equals_the_equation(shape, softmax):
    part = randomized(NodeAttention(features=shape[2], softmax=softmax))
    nodes = torch.randn(shape, dtype=torch.float64)
    expected = torch.stack([oracle.attention(g, part.state_dict(), softmax=softmax) for g in nodes])
    torch.testing.assert_close(part(nodes), expected, **EXACT)


@pytest.mark.parametrize("softmax", [True, False])
def test_attention_is_equivariant_to_a_permutation_of_the_nodes(softmax):
    part = randomized(NodeAttention(features=3, softmax=softmax))
    nodes, order = torch.randn(2, 6, 3, dtype=torch.float64), torch.randperm(6)
    torch.testing.assert_close(part(nodes[:, order]), part(nodes)[:, order], **EXACT)


def test_attention_averages_equal_nodes():
    """A softmax over the summed index leaves K equal nodes as they are."""
    value = torch.randn(1, 3, 1, dtype=torch.float64).expand(1, 3, 5)
    query, key = torch.randn(2, 1, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(node_attention(query, key, value), value, **EXACT)


def test_fully_connected_equals_the_equation():
    part = randomized(NodeFC(channels=32))
    nodes = torch.randn(3, 4, 8, dtype=torch.float64)
    expected = torch.stack([oracle.fully_connected(g, part.state_dict()) for g in nodes])
    torch.testing.assert_close(part(nodes), expected, **EXACT)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameters_of_the_paper():
    assert count(NodeGraph(nodes=16, features=16)) == 256 + 256 + 64
    assert count(NodeGraph(nodes=16, features=16, norm="LN")) == 256 + 256 + 64
    assert count(NodeGraph(nodes=16, features=16, norm="")) == 256 + 256
    assert count(NodeAttention(features=16)) == 768
    assert count(NodeFC(channels=256)) == 8192


@pytest.mark.parametrize("part", ["graph", "attention", "fc"])
def test_gradcheck(part):
    parts = {
        "graph": lambda: NodeGraph(nodes=4, features=4),
        "attention": lambda: NodeAttention(features=4),
        "fc": lambda: NodeFC(channels=16),
    }
    module = randomized(parts[part]())
    nodes = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, nodes)


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: NodeGraph(nodes=0, features=2), ValueError, "nodes: expected at least 1, got 0"),
        (lambda: NodeGraph(nodes=2, features=2.0), TypeError, "features: expected an integer"),
        (lambda: NodeGraph(nodes=2, features=2, adj="x"), ValueError, "'paper', 'released', got"),
        (lambda: NodeGraph(nodes=2, features=2, norm="GN"), ValueError, "node_norm: .* got 'GN'"),
        (lambda: NodeFC(channels=24), ValueError, "divide the second, got 16 and 24; use"),
    ],
)
def test_says_what_is_wrong(build, error, text):
    with pytest.raises(error, match=text):
        build()
