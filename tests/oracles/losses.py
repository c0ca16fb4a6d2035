"""Losses of label maps, pixel by pixel, in Python floats."""

import math


def pixels(logits, labels, ignore_index=255):
    """(loss, label) of every valid pixel of logits [B, K, H, W]."""
    found = []
    batch, _, height, width = logits.shape
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                label = int(labels[b, y, x])
                if label == ignore_index:
                    continue
                scores = [float(score) for score in logits[b, :, y, x]]
                largest = max(scores)
                total = sum(math.exp(score - largest) for score in scores)
                found.append((largest + math.log(total) - scores[label], label))
    return found


def cross_entropy(logits, labels, *, weights=None, ignore_index=255):
    """Weighted mean, 0 for none."""
    found = pixels(logits, labels, ignore_index)
    weights = weights or [1.0] * logits.shape[1]
    norm = sum(weights[label] for _, label in found)
    return sum(weights[label] * loss for loss, label in found) / norm if norm else 0.0


def ohem(logits, labels, *, threshold, min_kept, ignore_index=255):
    """Mean loss of the hard pixels, and how many they are."""
    losses = [loss for loss, _ in pixels(logits, labels, ignore_index)]
    if len(losses) > min_kept:
        probabilities = sorted(math.exp(-loss) for loss in losses)
        limit = max(threshold, probabilities[min_kept - 1])
        losses = [loss for loss in losses if math.exp(-loss) <= limit]
    return (sum(losses) / len(losses) if losses else 0.0), len(losses)


def binary_cross_entropy(logits, labels, ignore_index=255):
    """Mean over valid pixels of -y log s(x) - (1 - y) log(1 - s(x)), logits [B, 1, H, W]."""
    losses = []
    for logit, label in zip(
        logits[:, 0].flatten().tolist(), labels.flatten().tolist(), strict=True
    ):
        if label != ignore_index:
            probability = 1 / (1 + math.exp(-logit))
            losses.append(-math.log(probability if label else 1 - probability))
    return sum(losses) / len(losses) if losses else 0.0


def frequencies(labels, num_classes, ignore_index=255):
    """Share of every class among the valid labels."""
    valid = [label for label in labels.flatten().tolist() if label != ignore_index]
    return [valid.count(k) / len(valid) for k in range(num_classes)]
