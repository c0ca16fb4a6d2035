"""Boundary and direction targets by brute force, and refinement pixel by pixel."""

import math

# (dh, dw) by name, in the order of the bins.
STEPS = {
    "left": (0, -1),
    "up-left": (-1, -1),
    "up": (-1, 0),
    "up-right": (-1, 1),
    "right": (0, 1),
    "down-right": (1, 1),
    "down": (1, 0),
    "down-left": (1, -1),
}


def bin_of(angle):
    """Bin whose interval (centre - 22.5, centre + 22.5] holds the angle, a turn added or not."""
    for index in range(8):
        centre = -180 + 45 * index
        for turn in (angle, angle - 360):
            if centre - 22.5 < turn <= centre + 22.5:
                return index
    raise AssertionError(angle)


def distances(labels, label):
    """Distance of every pixel of a class to the nearest of another: dict (y, x) -> float."""
    height, width = labels.shape
    grid = [(y, x) for y in range(height) for x in range(width)]
    outside = [p for p in grid if labels[p] != label]
    return {p: min(math.dist(p, q) for q in outside) for p in grid if labels[p] == label}


def targets(labels, *, ignore_index=255, max_distance=5, min_area=1):
    """Boundary, direction and length of the gradient of every pixel: dicts (y, x) -> number."""
    boundary, direction, length = {}, {}, {}
    for label in set(labels.flatten().tolist()) - {ignore_index}:
        if (labels == label).sum() < min_area:
            continue
        e = distances(labels, label)
        for (y, x), distance in e.items():
            boundary[y, x] = int(distance < max_distance + 1)
            gy = gx = 0.0
            for dy in range(-2, 3):
                for dx in range(-2, 3):
                    if (dy, dx) != (0, 0):
                        value = e.get((y + dy, x + dx), 0.0) / (dy**2 + dx**2)
                        gy, gx = gy + dy * value, gx + dx * value
            direction[y, x] = bin_of(math.degrees(math.atan2(gy, gx)))
            length[y, x] = math.hypot(gy, gx)
    return boundary, direction, length


def refine(logits, mask, bins, scale=1):
    """Logits [K, H, W] of the neighbour in the direction of the bin, clamped to the map."""
    steps = list(STEPS.values())
    out = logits.clone()
    _, height, width = logits.shape
    for y in range(height):
        for x in range(width):
            if mask[y, x]:
                dh, dw = steps[int(bins[y, x])]
                row = min(max(y + scale * dh, 0), height - 1)
                column = min(max(x + scale * dw, 0), width - 1)
                out[:, y, x] = logits[:, row, column]
    return out
