"""Mixture-of-softmaxes attention, query by query and key by key (FPT, Eq. 2 and 4)."""

import torch


def mixture_row(query, keys, values, mixture, *, similarity, scale):
    """Output [V] of one query [D] for keys [K, D], values [K, V] and pi [N]."""
    width = len(query) // len(mixture)
    weights = torch.zeros(len(keys), dtype=torch.float64)
    for part, share in enumerate(mixture):
        of_part = slice(part * width, (part + 1) * width)
        logits = []
        for key in keys:
            q, k = query[of_part], key[of_part]
            alike = q @ k if similarity == "dot" else -(q - k).square().sum()
            logits.append(scale * alike)
        exponentials = (torch.stack(logits) - max(logits)).exp()
        weights = weights + share * exponentials / exponentials.sum()
    return weights @ values


def mixture_attention(query, key, value, mixture, **how):
    """[B, Q, D], [B, K, D], [B, K, V], [B, N] -> [B, Q, V]."""
    images = []
    for q, k, v, pi in zip(*(x.double() for x in (query, key, value, mixture)), strict=True):
        images.append(torch.stack([mixture_row(row, k, v, pi, **how) for row in q]))
    return torch.stack(images)


def local_mixture_attention(query, key, value, mixture, *, window, **how):
    """Maps [B, D, H, W], [B, D, H, W], [B, V, H, W], pi [B, N] -> [B, V, H, W]."""
    query, key, value, mixture = (x.double() for x in (query, key, value, mixture))
    out = torch.zeros_like(value)
    height, width = query.shape[2:]
    reach = range(-(window // 2), window // 2 + 1)
    for image, pi in enumerate(mixture):
        for y in range(height):
            for x in range(width):
                keys, values = [], []
                for row, column in [(y + dy, x + dx) for dy in reach for dx in reach]:
                    inside = 0 <= row < height and 0 <= column < width
                    at = (image, slice(None), row, column) if inside else None
                    keys.append(key[at] if inside else torch.zeros(key.shape[1]).double())
                    values.append(value[at] if inside else torch.zeros(value.shape[1]).double())
                out[image, :, y, x] = mixture_row(
                    query[image, :, y, x], torch.stack(keys), torch.stack(values), pi, **how
                )
    return out
