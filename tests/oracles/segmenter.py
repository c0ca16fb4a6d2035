"""Segmenter in float64, head by head, token by token, from Eqs. 1 to 4 and a state dict."""

import math

import torch


def layer_norm(x, weight, bias, eps):
    """[N, d], the variance biased."""
    centred = x - x.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + eps).sqrt() * weight + bias


def gelu(x):
    """x times the Gaussian distribution function."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attention(x, state, num_heads):
    """Eq. 3 for every head: output [N, d] and softmax maps [h, N, N]."""
    tokens, width = x.shape
    head = width // num_heads
    qkv = x @ state["attn.qkv.weight"].T + state["attn.qkv.bias"]
    query, key, value = qkv[:, :width], qkv[:, width : 2 * width], qkv[:, 2 * width :]
    out, maps = torch.zeros_like(x), torch.zeros(num_heads, tokens, tokens, dtype=x.dtype)
    for h in range(num_heads):
        part = slice(h * head, (h + 1) * head)
        for i in range(tokens):
            exponentials = torch.stack(
                [(query[i, part] @ key[j, part] / math.sqrt(head)).exp() for j in range(tokens)]
            )
            maps[h, i] = exponentials / exponentials.sum()
            out[i, part] = sum(maps[h, i, j] * value[j, part] for j in range(tokens))
    return out @ state["attn.proj.weight"].T + state["attn.proj.bias"], maps


def block(x, state, num_heads, eps):
    """Eqs. 1 and 2 for tokens [N, d]: output and softmax maps."""
    normed = layer_norm(x, state["norm1.weight"], state["norm1.bias"], eps)
    branch, maps = attention(normed, state, num_heads)
    x = x + branch
    hidden = layer_norm(x, state["norm2.weight"], state["norm2.bias"], eps)
    hidden = gelu(hidden @ state["mlp.fc1.weight"].T + state["mlp.fc1.bias"])
    return x + hidden @ state["mlp.fc2.weight"].T + state["mlp.fc2.bias"], maps


def part(state, prefix):
    """Entries below a prefix, in float64."""
    return {k[len(prefix) :]: v.double() for k, v in state.items() if k.startswith(prefix)}


def patches(image, state, patch_size):
    """Linear map of every patch of [3, H, W], row by row: [T, d]."""
    weight = state["proj.weight"].flatten(1)
    rows = []
    for top in range(0, image.shape[1], patch_size):
        for left in range(0, image.shape[2], patch_size):
            window = image[:, top : top + patch_size, left : left + patch_size]
            rows.append(weight @ window.flatten() + state["proj.bias"])
    return torch.stack(rows)


def encoder(image, state, *, patch_size, num_layers, num_heads, eps=1e-5):
    """Patch tokens [T, d] of [3, H, W] on the grid of training."""
    state = part(state, "")
    prefix = [state[name][0] for name in ("cls_token", "dist_token") if name in state]
    x = torch.cat([*prefix, patches(image, part(state, "patch_embed."), patch_size)])
    x = x + state["pos_embed"][0]
    for layer in range(num_layers):
        x, _ = block(x, part(state, f"blocks.{layer}."), num_heads, eps)
    return layer_norm(x, state["norm.weight"], state["norm.bias"], eps)[len(prefix) :]


def mask_scores(tokens, state, *, num_layers, num_heads, eps=1e-5, normalize_classes=True):
    """Eq. 4 before and after the last LN: two times [T, K]."""
    state = part(state, "")
    x = tokens @ state["proj_dec.weight"].T + state["proj_dec.bias"]
    x = torch.cat([x, state["cls_emb"][0]])
    for layer in range(num_layers):
        x, _ = block(x, part(state, f"blocks.{layer}."), num_heads, eps)
    x = layer_norm(x, state["decoder_norm.weight"], state["decoder_norm.bias"], eps)
    scores = torch.zeros(len(tokens), state["cls_emb"].shape[1], dtype=torch.float64)
    for t in range(scores.shape[0]):
        for k in range(scores.shape[1]):
            patch = x[t] @ state["proj_patch"]
            label = x[len(tokens) + k] @ state["proj_classes"]
            length = label.norm() if normalize_classes else 1.0
            scores[t, k] = patch @ label / (patch.norm() * length)
    normed = layer_norm(scores, state["mask_norm.weight"], state["mask_norm.bias"], eps)
    return scores, normed
