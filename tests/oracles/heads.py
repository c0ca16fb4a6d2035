"""The comparison heads, position by position, in the dtype of their arguments (give float64).

Every function takes one image [C, H, W] and the state of the module, in evaluation mode.
"""

import torch
import torch.nn.functional as F

from tests.oracles.squeeze import normalize_groups, normalize_rows


def conv(x, state, name):
    """1x1 or dilated 3x3 convolution, tap by tap, zeros outside."""
    weight = state[f"{name}.weight"]
    dilation = state.get(f"{name}.dilation", 1)
    reach = weight.shape[-1] // 2 * dilation
    height, width = x.shape[1:]
    padded = F.pad(x, [reach] * 4)
    groups = x.shape[0] // weight.shape[1]
    out = torch.zeros(len(weight), height, width, dtype=x.dtype)
    for dy in range(weight.shape[2]):
        for dx in range(weight.shape[3]):
            top, left = dy * dilation, dx * dilation
            window = padded[:, top : top + height, left : left + width].chunk(groups)
            taps = weight[:, :, dy, dx].chunk(groups)
            parts = [torch.tensordot(t, w, 1) for t, w in zip(taps, window, strict=True)]
            out += torch.cat(parts)
    bias = state.get(f"{name}.bias")
    return out if bias is None else out + bias[:, None, None]


def conv_norm(x, state, name, *, act=True):
    out = normalize_rows(conv(x, state, f"{name}.conv"), state, f"{name}.norm")
    return out.clamp(min=0) if act else out


def softmax(logits):
    """Of a list of numbers."""
    shifted = [(x - max(logits)).exp() for x in logits]
    return [x / sum(shifted) for x in shifted]


def positions(x):
    """Vectors of [C, H, W], row by row."""
    return [x[:, i, j] for i in range(x.shape[1]) for j in range(x.shape[2])]


def as_map(vectors, like):
    return torch.stack(vectors, 1).view(-1, *like.shape[1:])


def attend(query, keys, values, scale):
    """Vectors: one mean of `values` for every query."""
    out = []
    for q in query:
        weights = softmax([scale * (q @ k) for k in keys])
        out.append(sum(w * v for w, v in zip(weights, values, strict=True)))
    return out


def squeeze_excitation(x, state):
    mean = x.sum((1, 2)) / x[0].numel()
    gate = 1 / (1 + (-state["expand.weight"] @ (state["reduce.weight"] @ mean).clamp(min=0)).exp())
    return x * gate[:, None, None]


def non_local(x, state, *, scaled=True):
    query, keys, values = (positions(conv(x, state, n)) for n in ("query", "key", "value"))
    scale = len(query[0]) ** -0.5 if scaled else 1.0
    received = as_map(attend(query, keys, values, scale), x)
    return x + normalize_rows(conv(received, state, "out"), state, "norm")


def double_attention(x, state):
    features, gather, distribute = (
        positions(conv(x, state, n)) for n in ("features", "gather", "distribute")
    )
    descriptors = []
    for n in range(len(gather[0])):
        weights = softmax([logits[n] for logits in gather])
        descriptors.append(sum(w * f for w, f in zip(weights, features, strict=True)))
    received = []
    for logits in distribute:
        weights = softmax(list(logits))
        received.append(sum(w * d for w, d in zip(weights, descriptors, strict=True)))
    return x + normalize_rows(conv(as_map(received, x), state, "out"), state, "norm")


def compact_non_local(x, state, *, groups):
    theta, phi, g = (conv(x, state, n).chunk(groups) for n in ("theta", "phi", "g"))
    parts = []
    for t, p, value in zip(theta, phi, g, strict=True):
        # The affinity of two entries is theta_i phi_j; g is summed over j.
        parts.append(t * sum(a * b for a, b in zip(p.flatten(), value.flatten(), strict=True)))
    out = conv(torch.cat(parts), state, "out")
    return x + normalize_groups(out, state["norm.weight"], state["norm.bias"], groups)


def em_attention(x, state, *, iterations, frozen=None):
    """Output, and the bases [C, K] of the last E step and at the end; `frozen` replaces these."""
    features = positions(conv(x, state, "inner"))
    bases = list(state["bases"].t())
    for _ in range(iterations):
        before = bases
        weights = [softmax([f @ b for b in bases]) for f in features]
        bases = []
        for k in range(len(before)):
            share = sum(w[k] for w in weights) + 1e-6
            mean = sum(w[k] / share * f for w, f in zip(weights, features, strict=True))
            bases.append(mean / mean.norm())
    if frozen is not None:
        before, bases = ([b.detach() for b in frozen_bases.t()] for frozen_bases in frozen)
        weights = [softmax([f @ b for b in before]) for f in features]
    rebuilt = [sum(w * b for w, b in zip(ws, bases, strict=True)) for ws in weights]
    out = conv(as_map(rebuilt, x).clamp(min=0), state, "out")
    found = torch.stack(before, 1), torch.stack(bases, 1)
    return (x + normalize_rows(out, state, "norm")).clamp(min=0), found


def criss_cross(x, state, *, recurrences=2):
    for _ in range(recurrences):
        query, key, value = (conv(x, state, n) for n in ("query", "key", "value"))
        received = torch.zeros_like(value)
        for i in range(x.shape[1]):
            for j in range(x.shape[2]):
                cross = {(i, c) for c in range(x.shape[2])} | {(r, j) for r in range(x.shape[1])}
                cells = sorted(cross)
                weights = softmax([query[:, i, j] @ key[:, r, c] for r, c in cells])
                for w, (r, c) in zip(weights, cells, strict=True):
                    received[:, i, j] += w * value[:, r, c]
        x = x + state["gamma"] * received
    return x


def cells(x, size):
    """Means of a size x size grid of [C, H, W], row by row; cells overlap where they must."""
    out = []
    height, width = x.shape[1:]
    for i in range(size):
        for j in range(size):
            rows = range(i * height // size, -(-(i + 1) * height // size))
            columns = range(j * width // size, -(-(j + 1) * width // size))
            out.append(sum(x[:, r, c] for r in rows for c in columns) / (len(rows) * len(columns)))
    return out


def shared_key_attention(x, state, name, *, sizes=None):
    query = conv_norm(x, state, f"{name}.key")
    value = conv(x, state, f"{name}.value")
    if sizes is None:
        keys, values = positions(query), positions(value)
    else:
        keys, values = ([c for size in sizes for c in cells(m, size)] for m in (query, value))
    received = attend(positions(query), keys, values, query.shape[0] ** -0.5)
    return conv(as_map(received, x), state, f"{name}.out")


def object_context(x, state):
    context = shared_key_attention(x, state, "attention")
    return conv_norm(torch.cat([context, x]), state, "fuse")


def asymmetric_non_local(x, state, *, sizes):
    return x + shared_key_attention(x, state, "attention", sizes=sizes)


def bilinear(grid, size, *, align_corners):
    """Interpolation of [C, h, w], pixel by pixel."""
    out = torch.zeros(len(grid), *size, dtype=grid.dtype)

    def taps(i, old, new):
        if align_corners:
            at = i * (old - 1) / (new - 1) if new > 1 else 0.0
        else:
            at = max((i + 0.5) * old / new - 0.5, 0.0)
        low = min(int(at), old - 1)
        return [(low, 1 - (at - low)), (min(low + 1, old - 1), at - low)]

    for i in range(size[0]):
        for j in range(size[1]):
            for r, a in taps(i, grid.shape[1], size[0]):
                for c, b in taps(j, grid.shape[2], size[1]):
                    out[:, i, j] += a * b * grid[:, r, c]
    return out


def pyramid_pooling(x, state, *, bins, act=True, align_corners=False):
    maps = [x]
    for size in bins:
        grid = torch.stack(cells(x, size), 1).view(-1, size, size)
        grid = conv_norm(grid, state, f"bins.{size}", act=act)
        maps.append(bilinear(grid, x.shape[1:], align_corners=align_corners))
    return conv_norm(torch.cat(maps), state, "fuse")


def aspp(x, state, *, dilations):
    branches = [conv_norm(x, state, "pointwise")]
    for d in dilations:
        named = {**state, f"dilated.{d}.conv.dilation": d}
        branches.append(conv_norm(x, named, f"dilated.{d}"))
    mean = (x.sum((1, 2)) / x[0].numel())[:, None, None]
    branches.append(conv_norm(mean, state, "image").expand_as(branches[0]))
    return conv_norm(torch.cat(branches), state, "fuse")


def context_encoding(x, state):
    features = positions(conv_norm(x, state, "features"))
    codewords, scales = state["codewords"], state["scales"]
    encodings = [torch.zeros_like(c) for c in codewords]
    for f in features:
        weights = softmax(
            [-s * (f - c).square().sum() for s, c in zip(scales, codewords, strict=True)]
        )
        for k, weight in enumerate(weights):
            encodings[k] = encodings[k] + weight * (f - codewords[k])
    normed = normalize_rows(torch.stack(encodings), state, "norm").clamp(min=0)
    logits = state["gate.weight"] @ (normed.sum(0) / len(normed)) + state["gate.bias"]
    return (x + x / (1 + (-logits).exp())[:, None, None]).clamp(min=0)
