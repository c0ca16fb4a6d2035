"""Scaled cosine-similarity attention, query by query (A²-FPN, Eq. 3)."""

import torch


def scaled_cosine_weights(query, key, *, normalize_query=True):
    """Weights [Q, N] for query [Q, d] and key [N, d]."""
    query, key = query.double(), key.double()
    width = query.shape[1]
    rows = []
    for q in query:
        logits = []
        for k in key:
            length = k.norm() * (q.norm() if normalize_query else 1.0)
            logits.append(width**0.5 * (q @ k) / length)
        exponentials = torch.stack(logits).exp()
        rows.append(exponentials / exponentials.sum())
    return torch.stack(rows)
