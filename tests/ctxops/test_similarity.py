"""Scaled cosine-similarity attention (Eq. 3)."""

import pytest
import torch

from ctxops import scaled_cosine_attention
from ctxops.similarity import l2_normalize
from tests.oracles.attention import scaled_cosine_weights


def weights(query, key, **options):
    """The attention matrix [B, Q, N]: values that are unit vectors."""
    identity = torch.eye(key.shape[1], dtype=key.dtype).expand(key.shape[0], -1, -1)
    return scaled_cosine_attention(query, key, identity, **options)


def tokens(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("normalize_query", [True, False])
def test_equals_the_equation(normalize_query):
    query, key = tokens(2, 5, 6), tokens(2, 7, 6)
    expected = torch.stack(
        [
            scaled_cosine_weights(q, k, normalize_query=normalize_query)
            for q, k in zip(query, key, strict=True)
        ]
    )
    actual = weights(query, key, normalize_query=normalize_query)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_values_of_another_width_are_averaged():
    query, key, value = tokens(1, 3, 4), tokens(1, 5, 4), tokens(1, 5, 9)
    expected = weights(query, key) @ value
    torch.testing.assert_close(scaled_cosine_attention(query, key, value), expected)


def test_weights_sum_to_one_over_keys():
    total = weights(tokens(2, 5, 6), tokens(2, 7, 6)).sum(-1)
    torch.testing.assert_close(total, torch.ones(2, 5, dtype=torch.float64))


@pytest.mark.parametrize("normalize_query", [True, False])
def test_length_of_keys_does_not_matter(normalize_query):
    query, key = tokens(1, 5, 6), tokens(1, 7, 6)
    longer = key * torch.rand(1, 7, 1, dtype=torch.float64).add(0.1).mul(50)
    expected = weights(query, key, normalize_query=normalize_query)
    torch.testing.assert_close(weights(query, longer, normalize_query=normalize_query), expected)


def test_length_of_queries_matters_only_where_they_are_not_normalized():
    query, key = tokens(1, 5, 6), tokens(1, 7, 6)
    torch.testing.assert_close(weights(3 * query, key), weights(query, key))
    literal = weights(query, key, normalize_query=False)
    assert (weights(3 * query, key, normalize_query=False) - literal).abs().max() > 0.01


def test_keys_may_be_permuted_with_their_values():
    query, key, value = tokens(1, 5, 6), tokens(1, 7, 6), tokens(1, 7, 3)
    order = torch.randperm(7)
    shuffled = scaled_cosine_attention(query, key[:, order], value[:, order])
    torch.testing.assert_close(shuffled, scaled_cosine_attention(query, key, value))


def test_zero_vectors_attend_to_all_keys_alike():
    uniform = torch.full((1, 2, 4), 0.25, dtype=torch.float64)
    torch.testing.assert_close(weights(torch.zeros(1, 2, 6).double(), tokens(1, 4, 6)), uniform)


@pytest.mark.parametrize("length", [0.0, 1e-13])
def test_a_vector_without_direction_is_zero_and_gets_no_gradient(length):
    x = torch.full((2, 3), length, dtype=torch.float64)
    x[1] = 1.0
    x.requires_grad_()
    unit = l2_normalize(x, dim=1)
    assert unit[0].tolist() == [0, 0, 0]
    (unit * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert x.grad[0].tolist() == [0, 0, 0]
    assert x.grad[1].norm() > 0.1


def test_gradcheck():
    arguments = [tokens(1, 3, 4), tokens(1, 5, 4), tokens(1, 5, 2)]
    inputs = [argument.requires_grad_() for argument in arguments]
    assert torch.autograd.gradcheck(scaled_cosine_attention, inputs)


def test_keeps_no_matrix_of_queries_times_keys():
    """Also for tokens that are views of a map, where a fused kernel needs a packed copy."""
    query, key = (torch.randn(1, 16, n, requires_grad=True).transpose(1, 2) for n in (300, 200))
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    )
    with hooks:
        scaled_cosine_attention(query, key, key)
    assert max(saved) < 300 * 200


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32(dtype):
    query, key, value = (tokens(1, n, 64).to(dtype) for n in (5, 7, 7))
    with torch.autocast("cpu", dtype=dtype):
        out = scaled_cosine_attention(query, key, value)
    assert out.dtype == dtype
    expected = scaled_cosine_attention(query.double(), key.double(), value.double())
    torch.testing.assert_close(out.double(), expected, rtol=torch.finfo(dtype).eps / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        ([(2, 3, 4), (2, 5, 4), (2, 6, 4)], "put channels last"),
        ([(3, 4), (2, 5, 4), (2, 5, 4)], r"got \(3, 4\)"),
        ([(2, 3, 4), (2, 5, 6), (2, 5, 6)], "project both to the same width"),
        ([(1, 3, 4), (2, 5, 4), (2, 5, 4)], "one batch size and width"),
    ],
)
def test_says_what_is_wrong(shapes, text):
    with pytest.raises(ValueError, match=text):
        scaled_cosine_attention(*(torch.zeros(shape) for shape in shapes))
