"""Squeeze Reasoning, channel by channel and node by node, and the released module at once."""

import torch

EPS = 1e-5


# ---- the paper's module, evaluation mode, one image [C, H, W] at a time -----------------------
def pointwise(x, weight):
    """1x1 convolution of [C, H, W] with [C', C / groups, 1, 1]."""
    per_group = weight.shape[1]
    groups = x.shape[0] // per_group
    rows = []
    for j in range(len(weight)):
        first = j // (len(weight) // groups) * per_group
        rows.append(sum(weight[j, i, 0, 0] * x[first + i] for i in range(per_group)))
    return torch.stack(rows)


def normalize_rows(rows, state, name):
    """Batch norm with running statistics, else one group of all values, else nothing."""
    if f"{name}.weight" not in state:
        return rows
    out = torch.empty_like(rows)
    for r in range(len(rows)):
        if f"{name}.running_mean" in state:
            mean, var = state[f"{name}.running_mean"][r], state[f"{name}.running_var"][r]
        else:
            mean = rows.sum() / rows.numel()
            var = (rows - mean).square().sum() / rows.numel()
        standard = (rows[r] - mean) / (var + EPS).sqrt()
        out[r] = standard * state[f"{name}.weight"][r] + state[f"{name}.bias"][r]
    return out


def normalize_groups(x, weight, bias, groups):
    """Group norm of [C, H, W]."""
    out = []
    for part in x.chunk(groups):
        mean = part.sum() / part.numel()
        var = (part - mean).square().sum() / part.numel()
        out.append((part - mean) / (var + EPS).sqrt())
    return torch.cat(out) * weight[:, None, None] + bias[:, None, None]


def graph(nodes, state, *, adj="paper", last=torch.relu):
    """Eq. 5 for G [K, d]."""
    count, width = nodes.shape
    across, within = state["adjacency.weight"], state["transform.weight"]
    message = torch.stack(
        [sum(across[n, m, 0] * nodes[m] for m in range(count)) for n in range(count)]
    )
    message = normalize_rows(message, state, "adjacency_norm")
    mixed = nodes - message if adj == "paper" else nodes + message.clamp(min=0)
    rows = [sum(within[f, e, 0] * mixed[:, e] for e in range(width)) for f in range(width)]
    return last(normalize_rows(torch.stack(rows), state, "transform_norm")).t()


def attention(nodes, state, *, softmax=True):
    """Eq. 6 for G [K, d]."""
    query, key, value = (
        [state[f"{k}.weight"][..., 0] @ g for g in nodes] for k in ("query", "key", "value")
    )
    out = []
    for j in range(len(nodes)):
        affinity = torch.stack([q @ key[j] for q in query])
        if softmax:
            affinity = (affinity - affinity.max()).exp()
            affinity = affinity / affinity.sum()
        out.append(sum(a * v for a, v in zip(affinity, value, strict=True)).clamp(min=0))
    return torch.stack(out)


def fully_connected(nodes, state):
    hidden = (state["reduce.weight"] @ nodes.reshape(-1)).clamp(min=0)
    return (state["expand.weight"] @ hidden).clamp(min=0).view(nodes.shape)


def squeeze_reasoning(x, state, reason, *, nodes, pool="mean", norm_groups=None):
    """Eqs. 4 to 7 for one image; `reason` maps G [K, d] to [K, d]."""
    b = pointwise(x, state["squeeze_b.weight"])
    product = b * pointwise(x, state["squeeze_c.weight"]) if "squeeze_c.weight" in state else b
    vector = [channel.sum() / (channel.numel() if pool == "mean" else 1) for channel in product]
    width = len(vector) // nodes
    grouped = torch.stack([torch.stack(vector[n * width : (n + 1) * width]) for n in range(nodes)])
    reasoned = reason(grouped)
    reduced = pointwise(x, state["project.weight"]) if "project.weight" in state else b
    scaled = [reduced[j] * reasoned[j // width, j % width] for j in range(len(reduced))]
    update = pointwise(torch.stack(scaled), state["expand.weight"])
    if norm_groups:
        return x + normalize_groups(update, state["norm.weight"], state["norm.bias"], norm_groups)
    return x + normalize_rows(update, state, "norm")


# ---- the released module, a batch [B, C, H, W] at once, with its own names --------------------
def _batch_norm(z, state, name, training, buffers):
    """Batch norm over axes 0 and 2 of [B, R, n]; updated statistics go to `buffers`."""
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    if training:
        count = z.numel() // z.shape[1]
        batch_mean = z.mean((0, 2))
        batch_var = (z - batch_mean[:, None]).square().mean((0, 2))
        unbiased = batch_var * count / (count - 1)
        buffers[f"{name}_running_mean_after"] = 0.9 * mean + 0.1 * batch_mean
        buffers[f"{name}_running_var_after"] = 0.9 * var + 0.1 * unbiased
        mean, var = batch_mean, batch_var
    standard = (z - mean[:, None]) / (var[:, None] + EPS).sqrt()
    return standard * state[f"{name}.weight"][:, None] + state[f"{name}.bias"][:, None]


def released(x, state, *, nodes, training=False):
    """Output, and what lies in between: pooled nodes [B, K, d], vector [B, p], updated buffers."""
    t, p, g = (torch.einsum("oc,bchw->bohw", state[f"{k}.weight"][..., 0, 0], x) for k in "tpg")
    inner = {}
    pooled = torch.einsum("bohw,bohw->bo", p, g)
    width = pooled.shape[1] // nodes
    z = torch.stack(
        [torch.stack([pooled[:, f * nodes + n] for f in range(width)], -1) for n in range(nodes)], 1
    )
    inner["nodes"] = z
    message = torch.einsum("nm,bmf->bnf", state["conv_adj.weight"][..., 0], z)
    z = z + _batch_norm(message, state, "bn_adj", training, inner).clamp(min=0)
    z = torch.einsum("fe,bne->bfn", state["conv_wg.weight"][..., 0], z)
    z = _batch_norm(z, state, "bn_wg", training, inner).clamp(min=0)
    vector = torch.stack([z[:, f, n] for n in range(nodes) for f in range(width)], 1)
    inner["vector"] = vector
    ratio = x.shape[1] // t.shape[1]
    pairs = (t * vector[:, :, None, None]).repeat_interleave(ratio, 1)
    update = pairs * state["z.weight"].view(-1, 1, 1)
    weight, bias = state["gn.weight"], state["gn.bias"]
    groups = t.shape[1]
    normed = torch.stack([normalize_groups(u, weight, bias, groups) for u in update])
    return x + normed, inner
