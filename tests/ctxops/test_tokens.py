"""Patches, self-attention and the pre-norm block against loops, PyTorch's own layers, and rules."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ctxops.tokens import (
    MLP,
    PatchEmbedding,
    SelfAttention,
    TransformerBlock,
    attention_weights,
    layer_attention_map,
    pad_to_multiple,
    transformer_blocks,
)
from tests.oracles import segmenter as oracle


def randomized(module):
    """All parameters random, biases and norms too, in float64 and without dropout."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double().eval()


@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize(("width", "heads"), [(6, 1), (6, 3), (8, 2)])
def test_block_equals_the_equations(tokens, width, heads):
    block = randomized(TransformerBlock(embed_dim=width, num_heads=heads, layer_norm_eps=1e-3))
    x = torch.randn(2, tokens, width, dtype=torch.float64)
    state = oracle.part(block.state_dict(), "")
    expected = [oracle.block(image, state, heads, 1e-3) for image in x]
    torch.testing.assert_close(block(x), torch.stack([e[0] for e in expected]))
    torch.testing.assert_close(block.attention_map(x), torch.stack([e[1] for e in expected]))


def test_block_equals_torchs_layer():
    ours = randomized(TransformerBlock(embed_dim=12, num_heads=3))
    theirs = nn.TransformerEncoderLayer(
        12, 3, 48, activation="gelu", batch_first=True, norm_first=True, dtype=torch.float64
    ).eval()
    names = {
        "attn.qkv.weight": "self_attn.in_proj_weight",
        "attn.qkv.bias": "self_attn.in_proj_bias",
        "attn.proj": "self_attn.out_proj",
        "mlp.fc1": "linear1",
        "mlp.fc2": "linear2",
    }
    state = ours.state_dict()
    for old, new in names.items():
        state = {key.replace(old, new): value for key, value in state.items()}
    theirs.load_state_dict(state)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


def test_block_gradcheck():
    block = randomized(TransformerBlock(embed_dim=4, num_heads=2))
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,))


def test_tokens_are_a_set():
    block = randomized(TransformerBlock(embed_dim=8, num_heads=2))
    x, order = torch.randn(1, 6, 8, dtype=torch.float64), torch.randperm(6)
    torch.testing.assert_close(block(x[:, order]), block(x)[:, order])


def test_images_of_a_batch_do_not_mix():
    block = randomized(TransformerBlock(embed_dim=8, num_heads=2))
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(block(x), torch.cat([block(image[None]) for image in x]))


def test_strided_tokens_give_the_same():
    block = randomized(TransformerBlock(embed_dim=8, num_heads=2))
    x = torch.randn(2, 8, 5, dtype=torch.float64).transpose(1, 2)
    assert torch.equal(block(x), block(x.contiguous()))


def test_attention_map_averages_the_values():
    attention = randomized(SelfAttention(embed_dim=8, num_heads=2))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    weights = attention.attention_map(x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 5, dtype=torch.float64))
    value = attention.qkv(x)[..., 16:].unflatten(-1, (2, 4)).transpose(1, 2)
    mixed = (weights @ value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x), attention.proj(mixed))


def test_patches_are_linear_maps_row_by_row():
    embedding = randomized(PatchEmbedding(embed_dim=5, patch_size=2))
    image = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    state = oracle.part(embedding.state_dict(), "")
    expected = torch.stack([oracle.patches(one, state, 2) for one in image])
    torch.testing.assert_close(embedding(image), expected)
    laid_out = image.to(memory_format=torch.channels_last)
    torch.testing.assert_close(embedding(laid_out), expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 3), (4, 8)])
def test_padding_is_anchored_at_the_top_left(size):
    image = torch.randn(1, 2, *size)
    padded = pad_to_multiple(image, 4, value=3.0)
    assert all(side % 4 == 0 for side in padded.shape[2:])
    assert all(new - old < 4 for new, old in zip(padded.shape[2:], size, strict=True))
    assert torch.equal(padded[..., : size[0], : size[1]], image)
    assert padded.sum() == pytest.approx(
        (image.sum() + 3 * (padded.numel() - image.numel())).item(), rel=1e-5
    )


def test_nothing_is_copied_where_nothing_is_to_pad():
    image = torch.randn(1, 2, 4, 8)
    assert pad_to_multiple(image, 4) is image


def test_stochastic_depth_grows_linearly():
    blocks = transformer_blocks(num_layers=5, embed_dim=4, num_heads=1, drop_path_rate=0.2)
    rates = [block.drop_path.drop_path_rate for block in blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    (alone,) = transformer_blocks(num_layers=1, embed_dim=4, num_heads=1, drop_path_rate=0.2)
    assert alone.drop_path.drop_path_rate == 0


def test_stochastic_depth_drops_branches_of_whole_images():
    block = randomized(TransformerBlock(embed_dim=4, num_heads=1, drop_path_rate=0.5))
    for parameter in block.mlp.fc2.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(64, 3, 4, dtype=torch.float64)
    branch = block(x) - x
    factor = ((block.train()(x) - x) / branch).flatten(1)
    torch.testing.assert_close(factor, factor[:, :1].expand_as(factor), rtol=1e-6, atol=1e-6)
    assert set(factor[:, 0].round().tolist()) == {0, 2}


@pytest.mark.parametrize(
    "place", ["attention weights", "attention output", "hidden features", "MLP output"]
)
def test_dropout_acts_in_training_at_every_place(place):
    """With the other places made blind to dropout, the output must still vary."""
    x = torch.randn(1, 6, 4)
    if place.startswith("attention"):
        module = SelfAttention(embed_dim=4, num_heads=1, dropout=0.5)
        if place == "attention weights":
            # One feature of a sum of weights: output dropout gives 0 or 2 times it.
            nn.init.zeros_(module.qkv.weight)
            nn.init.ones_(module.qkv.bias)
            nn.init.eye_(module.proj.weight)
            values = module(x).unique()
            assert len(values) > 2  # 0 and 2, if only the output dropped
            return
        nn.init.zeros_(module.proj.weight)
        nn.init.ones_(module.proj.bias)
        assert set(module(x).unique().tolist()) == {0, 2}
        return
    module = MLP(embed_dim=4, hidden_dim=4, dropout=0.5)
    nn.init.zeros_(module.fc1.weight)
    nn.init.constant_(module.fc1.bias, 20.0)  # GELU(20) = 20
    if place == "hidden features":
        nn.init.ones_(module.fc2.weight)
        assert len(module(x).unique()) > 2
    else:
        nn.init.zeros_(module.fc2.weight)
        nn.init.ones_(module.fc2.bias)
        assert set(module(x).unique().tolist()) == {0, 2}


def test_evaluation_and_attention_maps_know_no_dropout():
    block = TransformerBlock(embed_dim=8, num_heads=2, dropout=0.5, drop_path_rate=0.5)
    x = torch.randn(2, 5, 8)
    maps = block.attention_map(x)
    assert torch.equal(maps, block.attention_map(x))
    block.eval()
    assert torch.equal(block(x), block(x))


def test_layers_start_as_specified():
    block = TransformerBlock(embed_dim=96, num_heads=2)
    for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert layer.bias.abs().max() == 0
    for norm in (block.norm1, block.norm2):
        assert norm.eps == 1e-5
        assert torch.equal(norm.weight, torch.ones(96))
        assert torch.equal(norm.bias, torch.zeros(96))


@pytest.mark.parametrize("width", [8, 64])
def test_parameter_count(width):
    block = TransformerBlock(embed_dim=width, num_heads=2)
    assert sum(p.numel() for p in block.parameters()) == 12 * width**2 + 13 * width


def test_softmax_of_half_precision_is_in_float32():
    query, key = 6 * torch.randn(2, 1, 2, 9, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = attention_weights(query, key)
    assert weights.dtype == torch.float32
    expected = (query.double() @ key.double().transpose(-2, -1) / 2).softmax(-1)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-6)


def test_fused_attention_of_half_precision_sums_in_float32():
    """What the modules rely on: a softmax of logits rounded to bfloat16 is many times worse."""
    q, k, v = torch.randn(3, 1, 1, 400, 16).unbind(0)
    q, k, v = (4 * q).bfloat16(), (4 * k).bfloat16(), v.bfloat16()
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    rounded = (q @ k.transpose(-2, -1) / 4).softmax(-1) @ v
    fused = F.scaled_dot_product_attention(q, k, v)
    assert (fused - exact).abs().max() < (rounded - exact).abs().max() / 4
    torch.testing.assert_close(fused.double(), exact, rtol=2**-8, atol=2**-8)


def test_bfloat16_autocast_forward_and_backward():
    block = TransformerBlock(embed_dim=8, num_heads=2)
    x = torch.randn(2, 5, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = block(x)
        out.sum().backward()
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, block(x), rtol=0.02, atol=0.02)
    for parameter in (x, *block.parameters()):
        assert parameter.grad.isfinite().all()


def test_map_of_a_layer_sees_the_layers_before_it():
    blocks = transformer_blocks(num_layers=3, embed_dim=8, num_heads=2)
    x = torch.randn(1, 4, 8)
    expected = blocks[2].attention_map(blocks[1](blocks[0](x)))
    assert torch.equal(layer_attention_map(blocks, x, layer=2), expected)
    assert torch.equal(layer_attention_map(blocks, x, layer=-1), expected)
    assert torch.equal(layer_attention_map(blocks, x, layer=-3), blocks[0].attention_map(x))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: SelfAttention(embed_dim=8, num_heads=3),
            ValueError,
            "num_heads and embed_dim: .* got 3 and 8; use 2 instead of 3",
        ),
        (lambda: SelfAttention(embed_dim=8, num_heads=2.0), TypeError, "num_heads"),
        (lambda: MLP(embed_dim=8, hidden_dim=0), ValueError, "hidden_dim: expected at least 1"),
        (lambda: MLP(embed_dim=8, hidden_dim=8, dropout=1.0), ValueError, "dropout: expected a pr"),
        (
            lambda: TransformerBlock(embed_dim=8, num_heads=2, drop_path_rate=-0.1),
            ValueError,
            "drop_path_rate: expected a probability",
        ),
        (
            lambda: TransformerBlock(embed_dim=8, num_heads=2)(torch.zeros(1, 8, 2, 2)),
            ValueError,
            r"x: expected non-empty tokens \[B, N, C\], got shape \(1, 8, 2, 2\)",
        ),
        (
            lambda: TransformerBlock(embed_dim=8, num_heads=2).attention_map(torch.zeros(1, 3, 9)),
            ValueError,
            "x: expected 8 channels, got 9",
        ),
        (
            lambda: PatchEmbedding(embed_dim=8, patch_size=4)(torch.zeros(1, 3, 8, 10)),
            ValueError,
            r"multiples of 4, got \(8, 10\); use pad_to_multiple\(image, 4\)",
        ),
        (
            lambda: PatchEmbedding(embed_dim=8, patch_size=4)(torch.zeros(1, 1, 8, 8)),
            ValueError,
            "image: expected 3 channels, got 1",
        ),
        (lambda: PatchEmbedding(embed_dim=8, patch_size=0), ValueError, "patch_size: expected at"),
        (lambda: pad_to_multiple(torch.zeros(1, 3, 8, 8), 0), ValueError, "multiple: expected at"),
        (
            lambda: transformer_blocks(num_layers=0, embed_dim=8, num_heads=2),
            ValueError,
            "num_layers: expected at least 1",
        ),
        (
            lambda: layer_attention_map(
                transformer_blocks(num_layers=2, embed_dim=8, num_heads=2),
                torch.zeros(1, 3, 8),
                layer=2,
            ),
            ValueError,
            "layer: expected an index of 2 layers, got 2; use 0 to 1, or -1 for the last",
        ),
    ],
)
def test_says_what_is_wrong(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.slow
def test_compiled_and_exported_equal_eager():
    block = randomized(TransformerBlock(embed_dim=8, num_heads=2))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x))
    torch.testing.assert_close(torch.export.export(block, (x,)).module()(x), block(x))
