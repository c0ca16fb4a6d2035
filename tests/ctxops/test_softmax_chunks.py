"""Self-attention in chunks: the same numbers as the definition, dropout that can be drawn again."""

import pytest
import torch

from ctxops import softmax_chunks, tokens
from ctxops.softmax_chunks import chunked_attention, takes_chunks
from ctxops.tokens import SelfAttention

SHAPES = [(1, 1, 1, 1), (2, 7, 3, 4), (1, 13, 2, 5), (3, 4, 1, 2)]


@pytest.fixture(autouse=True, params=[1, 40, 2**20])
def chunk_bytes(request, monkeypatch):
    """Chunks of one row, some rows, all rows."""
    monkeypatch.setattr(softmax_chunks, "CHUNK_BYTES", request.param)
    monkeypatch.setattr(softmax_chunks, "MIN_TOKENS", 1)
    return request.param


def packed(batch, tokens, heads, width, *, scale=1.0):
    torch.manual_seed(0)
    return (scale * torch.randn(batch, tokens, 3, heads, width)).requires_grad_()


def definition(qkv, mask=None):
    """softmax(q kT / sqrt(d)) v in float64; mask [B, h, N, N] multiplies the weights."""
    q, k, v = qkv.double().permute(2, 0, 3, 1, 4).unbind(0)
    weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
    weights = weights if mask is None else weights * mask
    return (weights @ v).transpose(1, 2)


def gradients(out, qkv, grad):
    return torch.autograd.grad(out, qkv, grad.to(out.dtype))[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradient_are_those_of_the_definition(shape):
    qkv = packed(*shape)
    out, expected = chunked_attention(qkv), definition(qkv)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)
    grad = torch.randn_like(out)
    torch.testing.assert_close(
        gradients(out, qkv, grad), gradients(expected, qkv, grad), rtol=0, atol=5e-6
    )


def test_large_logits():
    """Weights that are one and zero; nothing overflows."""
    qkv = packed(1, 9, 2, 4, scale=60.0)
    out, expected = chunked_attention(qkv), definition(qkv)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-3)
    assert gradients(out, qkv, torch.randn_like(out)).isfinite().all()


def test_images_and_heads_do_not_see_each_other():
    qkv = packed(2, 6, 3, 4)
    alone = torch.cat(
        [chunked_attention(qkv[b : b + 1, :, :, h : h + 1]) for b in range(2) for h in range(3)]
    )
    together = chunked_attention(qkv).permute(0, 2, 1, 3).reshape(6, 6, 1, 4)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


def recovered_mask(tokens, heads, dropout_p, seed):
    """What dropout multiplied the weights with, found by unit vectors as values."""
    qkv = torch.zeros(1, tokens, 3, heads, tokens)
    qkv[:, :, 2] = torch.eye(tokens)[:, None]
    torch.manual_seed(seed)
    out = chunked_attention(qkv, dropout_p=dropout_p)  # [1, N, h, N]: weight * mask
    return (out * tokens).permute(0, 2, 1, 3)


def test_dropout_is_drawn_again_in_the_backward_pass():
    mask = recovered_mask(8, 2, 0.3, seed=5)
    kept = mask.bool()
    torch.testing.assert_close(mask, kept / 0.7, rtol=0, atol=1e-5)
    assert 0 < kept.float().mean() < 1
    qkv = packed(1, 8, 2, 8)
    torch.manual_seed(5)
    out, expected = chunked_attention(qkv, dropout_p=0.3), definition(qkv, mask.double())
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=5e-6)
    torch.manual_seed(99)  # nothing else is drawn
    grad = torch.randn_like(out)
    torch.testing.assert_close(
        gradients(out, qkv, grad), gradients(expected, qkv, grad), rtol=0, atol=1e-5
    )


def test_share_of_dropped_weights():
    mask = recovered_mask(64, 4, 0.1, seed=0)
    # Standard deviation of the mean over 16384 weights is 0.0023.
    assert abs((mask == 0).float().mean().item() - 0.1) < 0.01
    assert not torch.equal(mask[:, 0], mask[:, 1])


def test_numbers_come_from_the_global_generator():
    qkv = packed(1, 8, 2, 4).detach()
    torch.manual_seed(3)
    first, second = (chunked_attention(qkv, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(first, chunked_attention(qkv, dropout_p=0.5))
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    chunked_attention(qkv)
    assert torch.equal(state, torch.get_rng_state())


def test_who_takes_chunks(monkeypatch):
    qkv = packed(1, 8, 2, 4)
    assert takes_chunks(qkv)
    assert not takes_chunks(qkv.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not takes_chunks(qkv)
    monkeypatch.setattr(softmax_chunks, "MIN_TOKENS", 9)
    assert not takes_chunks(qkv)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_module_takes_them_and_equals_the_fused_form(dropout, monkeypatch):
    torch.manual_seed(1)
    attention, x = SelfAttention(embed_dim=8, num_heads=2, dropout=dropout), torch.randn(2, 9, 8)
    asked = []

    def spy(qkv, *, dropout_p):
        asked.append(dropout_p)
        return chunked_attention(qkv, dropout_p=dropout_p)

    monkeypatch.setattr(tokens, "chunked_attention", spy)
    attention(x)
    attention.eval()
    ours = attention(x)
    assert asked == [dropout, 0.0]
    monkeypatch.setattr(softmax_chunks, "MIN_TOKENS", 10)
    torch.testing.assert_close(ours, attention(x), rtol=0, atol=1e-6)


def test_nothing_of_tokens_squared_is_kept():
    qkv = packed(1, 64, 2, 4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        chunked_attention(qkv, dropout_p=0.1)
    assert max(t.numel() for t in kept) == qkv.numel()
