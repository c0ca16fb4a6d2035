"""The Feature Pyramid Transformer from its equations, pixel by pixel in float64.

Weights come from a state dict, by name. Maps are [C, H, W] of one image.
"""

import torch


def conv(x, weight, bias=None, *, stride=1):
    """Convolution with zero padding of half the window, output pixel by output pixel."""
    rows, columns = weight.shape[2:]
    top, left = rows // 2, columns // 2
    padded = torch.zeros(x.shape[0], x.shape[1] + 2 * top, x.shape[2] + 2 * left).double()
    padded[:, top : top + x.shape[1], left : left + x.shape[2]] = x
    out = torch.zeros(weight.shape[0], -(-x.shape[1] // stride), -(-x.shape[2] // stride)).double()
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            window = padded[:, i * stride : i * stride + rows, j * stride : j * stride + columns]
            out[:, i, j] = (weight * window).sum((1, 2, 3))
    return out if bias is None else out + bias[:, None, None]


def normalize(x, weights, prefix):
    """Evaluation-mode batch norm, group norm of 32 groups, or nothing: what the weights say."""
    if f"{prefix}.weight" not in weights:
        return x
    if f"{prefix}.running_mean" in weights:
        mean, variance = weights[f"{prefix}.running_mean"], weights[f"{prefix}.running_var"]
    else:
        groups = x.reshape(32, -1)
        repeats = x.shape[0] // 32
        mean = groups.mean(1).repeat_interleave(repeats)
        variance = groups.var(1, correction=0).repeat_interleave(repeats)
    unit = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    return (
        unit * weights[f"{prefix}.weight"][:, None, None] + weights[f"{prefix}.bias"][:, None, None]
    )


def conv_norm(x, weights, prefix, *, stride=1):
    out = conv(
        x, weights[f"{prefix}.conv.weight"], weights.get(f"{prefix}.conv.bias"), stride=stride
    )
    return normalize(out, weights, f"{prefix}.norm")


def project(x, weights, prefix):
    """Pixel -> vector of width d, by a 1x1 convolution."""
    return conv(x, weights[f"{prefix}.weight"], weights.get(f"{prefix}.bias"))


def mixture(vectors, weights, prefix):
    """pi of Eq. 2, [N]."""
    weight = weights.get(f"{prefix}.mixture.weight")
    if weight is None:
        return torch.ones(1).double()
    mean = torch.stack([v for v in vectors.flatten(1).T]).mean(0)
    exponentials = (weight @ mean).exp()
    return exponentials / exponentials.sum()


def mos_pixel(query, keys, values, pi, similarity, scale):
    """Eqs. 2 and 3 (or 4 and 5) for one query [d], keys [K, d], values [K, d]."""
    width = len(query) // len(pi)
    out = 0
    for n, share in enumerate(pi):
        part = slice(n * width, (n + 1) * width)
        logits = []
        for key in keys:
            q, k = query[part], key[part]
            logits.append(scale * (q @ k if similarity == "dot" else -((q - k) ** 2).sum()))
        exponentials = torch.stack(logits).exp()
        for weight, value in zip(exponentials / exponentials.sum(), values, strict=True):
            out = out + share * weight * value
    return out


def average_pool(x, stride):
    """Mean of the real pixels in windows of 2 s - 1, s apart."""
    if stride == 1:
        return x
    out = torch.zeros(x.shape[0], -(-x.shape[1] // stride), -(-x.shape[2] // stride)).double()
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            top, left = max(0, stride * i - stride + 1), max(0, stride * j - stride + 1)
            out[:, i, j] = x[:, top : stride * i + stride, left : stride * j + stride].mean((1, 2))
    return out


def attend(fine, coarse, weights, prefix, *, similarity, scale=None, pi_from="key", window=0):
    """Mixture attention of a fine map to a coarse one, before the output convolution."""
    query = project(fine, weights, f"{prefix}.query")
    shared = f"{prefix}.key.weight" not in weights
    key = project(coarse, weights, f"{prefix}.{'query' if shared else 'key'}")
    value = project(coarse, weights, f"{prefix}.value")
    pi = mixture(key if pi_from == "key" else query, weights, prefix)
    scale = query.shape[0] ** -0.5 if scale is None else scale
    out = torch.zeros_like(query)
    for y in range(query.shape[1]):
        for x in range(query.shape[2]):
            places = neighbours(y, x, coarse.shape[1:], window)
            keys, values = ([at(m, place) for place in places] for m in (key, value))
            out[:, y, x] = mos_pixel(query[:, y, x], keys, values, pi, similarity, scale)
    return out


def neighbours(y, x, size, window):
    """All places of a map, or those of a window around (y, x), inside or not."""
    if not window:
        return [(i, j) for i in range(size[0]) for j in range(size[1])]
    half = window // 2
    reach = range(-half, half + 1)
    return [(y + dy, x + dx) for dy in reach for dx in reach]


def at(x, place):
    """Vector of a place; zero outside the map."""
    inside = 0 <= place[0] < x.shape[1] and 0 <= place[1] < x.shape[2]
    return x[:, place[0], place[1]] if inside else torch.zeros(x.shape[0]).double()


def self_transformer(x, weights, prefix, *, similarity="dot", kv_pool=1, **options):
    """ST: residual, output convolution, norm."""
    pooled = average_pool(x, kv_pool)
    out = attend(x, pooled, weights, prefix, similarity=similarity, **options)
    return x + conv_norm(out, weights, f"{prefix}.output")


def grounding_transformer(fine, coarse, weights, prefix, *, similarity="euclidean", **options):
    """GT, and LGT with a window."""
    out = attend(fine, coarse, weights, prefix, similarity=similarity, **options)
    return conv_norm(out, weights, f"{prefix}.output")


def rendering_transformer(coarse, fine, weights, prefix, *, sigmoid=False, stride=2):
    """RT, Eq. 6."""
    gate = torch.stack([channel.mean() for channel in fine])
    gate = 1 / (1 + (-gate).exp()) if sigmoid else gate
    rendered = conv_norm(coarse * gate[:, None, None], weights, f"{prefix}.query").clamp(min=0)
    value, link = fine, 1
    while f"{prefix}.value.link{link}.conv.weight" in weights:
        value = value if link == 1 else value.clamp(min=0)
        value = conv_norm(value, weights, f"{prefix}.value.link{link}", stride=stride)
        link += 1
    return conv_norm((rendered + value).clamp(min=0), weights, f"{prefix}.output")


def pyramid_transformer(levels, weights, *, window=0, same_size=False):
    """The whole block with all pairs; `levels` fine to coarse, [C, H_l, W_l] each."""
    names = [f"p{2 + level}" for level in range(len(levels))]
    outputs = []
    for i, x in enumerate(levels):
        maps = [self_transformer(x, weights, f"st.{names[i]}")]
        for j in reversed(range(i)):
            prefix = f"rt.{names[i]}_from_{names[j]}"
            stride = 1 if same_size else 2
            maps.append(rendering_transformer(x, levels[j], weights, prefix, stride=stride))
        for j in range(i + 1, len(levels)):
            prefix = f"gt.{names[i]}_from_{names[j]}"
            maps.append(grounding_transformer(x, levels[j], weights, prefix, window=window))
        maps.append(x)
        outputs.append(conv_norm(torch.cat(maps), weights, f"fuse.{names[i]}"))
    return outputs
