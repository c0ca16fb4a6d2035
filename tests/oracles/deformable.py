"""Deformable attention written from the equation: one sample after the other, in float64."""

import math

import torch


def pixel(image, row, column):
    """Value [D] of a map [H, W, D], zero outside."""
    height, width, _ = image.shape
    if 0 <= row < height and 0 <= column < width:
        return image[row, column]
    return torch.zeros_like(image[0, 0])


def bilinear(image, x, y):
    """Sample a map [H, W, D] at (x, y) in [0, 1]: edges of the map at 0 and 1, zeros outside."""
    height, width, _ = image.shape
    column, row = x * width - 0.5, y * height - 0.5
    left, top = math.floor(column), math.floor(row)
    sample = torch.zeros_like(image[0, 0])
    for i in (top, top + 1):
        for j in (left, left + 1):
            share = (1 - abs(row - i)) * (1 - abs(column - j))
            sample = sample + share * pixel(image, i, j)
    return sample


def attend(value, level_shapes, locations, weights):
    """[B, S, M, D], [B, Q, M, L, N, 2], [B, Q, M, L, N] -> [B, Q, M D]."""
    batch, _, heads, width = value.shape
    out = value.new_zeros(batch, weights.shape[1], heads, width)
    for b in range(batch):
        start = 0
        for level, (rows, columns) in enumerate(level_shapes):
            image = value[b, start : start + rows * columns].view(rows, columns, heads, width)
            start += rows * columns
            for q in range(weights.shape[1]):
                for m in range(heads):
                    for n in range(weights.shape[-1]):
                        x, y = locations[b, q, m, level, n]
                        share = weights[b, q, m, level, n]
                        out[b, q, m] += share * bilinear(image[:, :, m], float(x), float(y))
    return out.flatten(2)


def module(weights, query, reference_points, value, level_shapes, *, heads, points):
    """The whole layer from a state dict, loop by loop (UN-EPT, Sec. 3.1)."""

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    batch, queries, _ = query.shape
    levels = len(level_shapes)
    offsets = linear("sampling_offsets", query).view(batch, queries, heads, levels, points, 2)
    logits = linear("attention_weights", query).view(batch, queries, heads, levels * points)
    exponentials = logits.exp()
    shares = (exponentials / exponentials.sum(-1, keepdim=True)).view(
        batch, queries, heads, levels, points
    )
    locations = torch.empty_like(offsets)
    for level, (rows, columns) in enumerate(level_shapes):
        for axis, extent in enumerate((columns, rows)):
            reference = reference_points[:, :, None, level, None, axis]
            locations[..., level, :, axis] = reference + offsets[..., level, :, axis] / extent
    values = linear("value_proj", value).view(batch, value.shape[1], heads, -1)
    return linear("output_proj", attend(values, level_shapes, locations, shares))
