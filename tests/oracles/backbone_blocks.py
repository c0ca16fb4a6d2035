"""Context blocks of backbones, position by position, in the dtype of their arguments.

Every function takes one image [C, H, W] and the state of the module.
"""

import math

import torch

from tests.oracles.heads import conv, positions, softmax


def global_context(x, state):
    """GCNet, Eq. 4."""
    vectors = positions(x)
    weights = softmax([state["mask.weight"][0, :, 0, 0] @ v for v in vectors])
    pooled = sum(w * v for w, v in zip(weights, vectors, strict=True))
    hidden = state["reduce.weight"] @ pooled + state["reduce.bias"]
    centred = hidden - hidden.mean()
    hidden = centred / (centred.square().mean() + 1e-5).sqrt()
    hidden = (hidden * state["norm.weight"] + state["norm.bias"]).clamp(min=0)
    added = state["expand.weight"] @ hidden + state["expand.bias"]
    return x + added[:, None, None]


def window_means(x, stride):
    """Mean of the 3x3 windows at every stride-th position, of what lies inside the map."""
    height, width = x.shape[1:]
    rows = [
        torch.stack(
            [
                x[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].mean((1, 2))
                for j in range(0, width, stride)
            ],
            1,
        )
        for i in range(0, height, stride)
    ]
    return torch.stack(rows, 1)


def augmented_attention(query, key, value, rows, columns):
    """Of one head: maps [d or v, H, W], embeddings [2 M + 1, d] (AA, Eq. 3)."""
    far, width = len(rows) // 2, query.shape[2]
    out = []
    for i, q in enumerate(positions(query)):
        logits = []
        for j, k in enumerate(positions(key)):
            down = min(max(j // width - i // width, -far), far)
            right = min(max(j % width - i % width, -far), far)
            logits.append(q @ (k + rows[down + far] + columns[right + far]) / math.sqrt(len(q)))
        weights = softmax(logits)
        out.append(sum(w * v for w, v in zip(weights, positions(value), strict=True)))
    return torch.stack(out, 1).view(-1, *query.shape[1:])


def augmented_conv(x, state, *, heads, key_channels, stride=1):
    """AA, Eq. 4; the plain convolution is computed everywhere and then thinned out."""
    plain = conv(x, state, "conv")[:, ::stride, ::stride]
    seen = window_means(x, stride) if stride > 1 else x
    parts = conv(seen, state, "qkv").split_with_sizes(
        [key_channels, key_channels, len(state["qkv.weight"]) - 2 * key_channels]
    )
    attended = [
        augmented_attention(*head, state["rows"], state["columns"])
        for head in zip(*(part.chunk(heads) for part in parts), strict=True)
    ]
    return torch.cat([plain, conv(torch.cat(attended), state, "out")])
