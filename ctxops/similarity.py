"""Scaled cosine-similarity attention (A²-FPN, Eq. 3).

Letters: B batch, Q queries, N keys, d width of queries and keys, v width of the values.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ctxops.precision import autocast_off, widen

# Below this norm a vector counts as zero and has similarity 0 to everything.
NORM_EPS = 1e-12


def scaled_cosine_attention(
    query: Tensor, key: Tensor, value: Tensor, *, normalize_query: bool = True
) -> Tensor:
    """Values averaged with CF(Q, K, d) = softmax over keys of sqrt(d) cos(q, k) (Eq. 3).

    The similarity is *multiplied* by sqrt(d), which keeps its variance independent of d. The whole
    computation is in float32 under autocast; no Q x N matrix is kept where PyTorch has a fused
    attention kernel for the device.

    Deviation: Eq. 3 as printed normalises the keys only. The text calls the quantity a cosine, so
    queries are normalised as well by default.

    Args:
        query: [B, Q, d].
        key: [B, N, d].
        value: [B, N, v].
        normalize_query: False gives the literal Eq. 3, sqrt(d) * q . k / |k|.

    Returns:
        [B, Q, v], in the dtype of `value`.

    Raises:
        ValueError: If the shapes do not fit together.
    """
    if query.dim() != 3 or key.dim() != 3 or key.shape[:2] != value.shape[:2]:
        raise ValueError(
            "attention: expected query [B, Q, d], key [B, N, d], value [B, N, v], got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}; "
            "put channels last: x.flatten(2).transpose(1, 2)"
        )
    if query.shape[0] != key.shape[0] or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"attention: expected query and key of one batch size and width, got "
            f"{tuple(query.shape)} and {tuple(key.shape)}; project both to the same width"
        )
    with autocast_off(query):
        q, k, v = _one_head(query), _one_head(key), _one_head(value)
        q = l2_normalize(q, dim=-1) if normalize_query else q
        k = l2_normalize(k, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v, scale=math.sqrt(query.shape[-1]))
    return out[:, 0].to(value.dtype)


def l2_normalize(x: Tensor, *, dim: int) -> Tensor:
    """Divide by the Euclidean norm, computed in at least float32 (Norm of Eq. 1).

    Args:
        x: Tensor of any shape.
        dim: Axis of the vectors.

    Returns:
        Unit vectors in float32 or wider. A vector with a norm of at most 1e-12 has no direction: it
        becomes zero and gets no gradient, which would be as large as 1 / norm.
    """
    x = widen(x)
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / torch.where(norm > NORM_EPS, norm, torch.inf)


def _one_head(x: Tensor) -> Tensor:
    """[B, N, d] -> [B, 1, N, d], packed: fused kernels refuse strided vectors."""
    return widen(x)[:, None].contiguous()
