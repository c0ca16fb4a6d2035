"""Mixture-of-softmaxes attention (FPT, Eq. 2 and 4), global; `local_attention` has the window form.

Queries and keys are split along channels into N parts, each part has a softmax over all keys of its
own, and one scalar per image and part mixes them:

    w(i, j) = sum_n pi_n softmax_j(scale * sim(q_in, k_jn)),    out_i = sum_j w(i, j) v_j

with sim = q . k ("dot") or -|q - k|^2, summed over the channels of the part ("euclidean").

The same numbers four ways:

- `naive`: the definition, every weight materialised. The reference, and the hungry one.
- `sdpa`: PyTorch's fused attention with parts as heads; the squared norms of the keys ride in an
  extra channel. Memory linear in the number of tokens, traceable.
- `sdpa_half`: the same in half precision, the dtype of the query or else bfloat16.
- `chunked`: chunks of queries with a backward pass of its own (see `mixture_chunks`): the weights
  are mixed before the one product with the values. No second derivatives.
- `auto`: `chunked` on the CPU, `sdpa` elsewhere.

With dropout, and inside a torch.compile or torch.export of the caller, `chunked` is `sdpa`.

Letters: B batch, Q queries, K keys, D width of queries and keys, N parts, d = D / N, V width of the
values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ctxops.checks import check_choice, check_divides, check_probability, check_tokens
from ctxops.mixture_chunks import MixtureChunks
from ctxops.precision import autocast_off, widen, widened_dtype

SIMILARITIES = ("dot", "euclidean")
IMPLS = ("auto", "sdpa", "sdpa_half", "chunked", "naive")
# Fused kernels on accelerators refuse widths that are no multiple of this.
WIDTH_MULTIPLE = 8


def mixture_weights(mean_key: Tensor, weight: Tensor) -> Tensor:
    """Mixture weights pi = softmax over parts of W kbar (FPT, Eq. 2).

    Args:
        mean_key: kbar, the mean over the positions of the full-width keys [B, D].
        weight: W [N, D].

    Returns:
        pi [B, N], positive, sums to 1 over N; in at least float32 whatever the arguments are.

    Raises:
        ValueError: If the shapes do not fit together.
    """
    if mean_key.dim() != 2 or weight.dim() != 2 or mean_key.shape[1] != weight.shape[1]:
        raise ValueError(
            "mixture_weights: expected mean_key [B, D] and weight [N, D] of one width, got "
            f"{tuple(mean_key.shape)} and {tuple(weight.shape)}; average the keys over positions"
        )
    with autocast_off(mean_key):
        return F.linear(widen(mean_key), widen(weight)).softmax(1)


def mixture_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixture: Tensor,
    *,
    similarity: str,
    scale: float,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Values averaged with a mixture of N softmaxes (FPT, Eq. 2 and 4); see the head of this file.

    The whole computation is in at least float32 under autocast, but for `sdpa_half`.

    Args:
        query: [B, Q, D].
        key: [B, K, D].
        value: [B, K, V].
        mixture: pi [B, N], sums to 1 over N; N divides D. See `mixture_weights`.
        similarity: `dot` or `euclidean`.
        scale: Factor of every logit.
        dropout_p: Probability of dropping a weight of a part, before mixing. The caller passes 0
            in evaluation mode.
        impl: See the head of this file.

    Returns:
        [B, Q, V], in the dtype of `value`.

    Raises:
        TypeError: If an argument is not a floating point tensor.
        ValueError: If the shapes do not fit together, a name is unknown, or `dropout_p` is no
            probability.
    """
    check_choice(similarity, "similarity", SIMILARITIES)
    check_choice(impl, "impl", IMPLS)
    check_probability(dropout_p, "dropout_p")
    _check_tokens(query, key, value)
    check_mixture(mixture, batch=query.shape[0], width=query.shape[2])
    euclidean = similarity == "euclidean"
    dtype = widened_dtype(query.dtype)
    with autocast_off(query):
        q, k, v, pi = (x.to(dtype) for x in (query, key, value, mixture))
        if impl == "naive":
            out = _naive(q, k, v, pi, euclidean, scale, dropout_p)
        elif _takes_chunks(impl, query, dropout_p):
            out = _chunked(q, k, v, pi, euclidean, scale)
        else:
            half = query.dtype if query.dtype.itemsize == 2 else torch.bfloat16
            fused_dtype = half if impl == "sdpa_half" else dtype
            out = _sdpa(q, k, v, pi, euclidean, scale, dropout_p, fused_dtype)
    return out.to(value.dtype)


def check_mixture(mixture: Tensor, *, batch: int, width: int) -> None:
    """Refuse mixture weights that are not [B, N] with N dividing the width of the queries.

    Args:
        mixture: The argument to look at.
        batch: The required B.
        width: D.

    Raises:
        TypeError: If it is not a floating point tensor.
        ValueError: If its shape does not fit.
    """
    if not isinstance(mixture, Tensor) or not mixture.is_floating_point():
        kind = mixture.dtype if isinstance(mixture, Tensor) else type(mixture).__name__
        raise TypeError(f"mixture: expected floating point, got {kind}; use mixture_weights")
    if mixture.dim() != 2 or mixture.shape[0] != batch or mixture.shape[1] == 0:
        raise ValueError(
            f"mixture: expected [B, N] with B = {batch}, got shape {tuple(mixture.shape)}; "
            "one weight per image and part, see mixture_weights"
        )
    check_divides(mixture.shape[1], width, "parts of the mixture and channels of the query")


def _check_tokens(query: Tensor, key: Tensor, value: Tensor) -> None:
    check_tokens(query, "query")
    check_tokens(key, "key", channels=query.shape[2])
    check_tokens(value, "value")
    if not query.shape[0] == key.shape[0] == value.shape[0] or key.shape[1] != value.shape[1]:
        raise ValueError(
            "attention: expected query [B, Q, D], key [B, K, D], value [B, K, V] of one B and K, "
            f"got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}; "
            "keys and values come from the same map"
        )


def _takes_chunks(impl: str, query: Tensor, dropout_p: float) -> bool:
    if dropout_p > 0 or torch.compiler.is_compiling():
        return False
    return impl == "chunked" or (impl == "auto" and query.device.type == "cpu")


def _naive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixture: Tensor,
    euclidean: bool,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """The definition. -|q - k|^2 is expanded: the differences alone would be Q x K x D numbers."""
    q, k = _as_heads(query, mixture), _as_heads(key, mixture)
    similarity = q @ k.transpose(-1, -2)  # [B, N, Q, K]
    if euclidean:
        norms = _squared_norms(q) + _squared_norms(k).transpose(-1, -2)
        similarity = 2 * similarity - norms
    weights = F.dropout((scale * similarity).softmax(-1), dropout_p)
    return (mixture[:, :, None, None] * weights).sum(1) @ value


def _chunked(
    query: Tensor, key: Tensor, value: Tensor, mixture: Tensor, euclidean: bool, scale: float
) -> Tensor:
    """Everything but the mixture itself stays under autograd."""
    if euclidean:
        query, key = _centred(query, key)
    q = _as_heads(query * (2 * scale if euclidean else scale), mixture)
    # Contiguous [B, D, K]: free where the keys come from a map, and fast in every product.
    k = _as_heads(key, mixture).transpose(2, 3).contiguous()
    bias = -scale * k.square().sum(2) if euclidean else None  # [B, N, K]
    out: Tensor = MixtureChunks.apply(q, k, bias, value, mixture)
    return out


def _centred(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the mean key as origin: distances stay, and lose less when they are expanded."""
    # The gradient with respect to the origin is 0, none is needed.
    origin = key.mean(1, keepdim=True).detach()
    return query - origin, key - origin


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixture: Tensor,
    euclidean: bool,
    scale: float,
    dropout_p: float,
    dtype: torch.dtype,
) -> Tensor:
    """Parts as heads of a fused attention, the values shared by all of them."""
    if euclidean:
        query, key = _centred(query, key)
    q, k = _as_heads(query, mixture).to(dtype), _as_heads(key, mixture).to(dtype)
    if euclidean:
        q, k = _with_norms(q, k)
    v = value[:, None].to(dtype)  # [B, 1, K, V]
    # Fused kernels want one width for all three, and whole vectors: tokens of a map are strided.
    width = max(q.shape[-1], v.shape[-1])
    width += -width % WIDTH_MULTIPLE
    q, k, v = (F.pad(x, (0, width - x.shape[-1])).contiguous() for x in (q, k, v))
    v = v.expand(-1, q.shape[1], -1, -1)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)
    parts = out[..., : value.shape[-1]]  # [B, N, Q, V]
    return (mixture[:, :, None, None] * parts).sum(1)


def _with_norms(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """[2q, 1] and [k, -|k|^2], whose product is -|q - k|^2 but for what all keys share.

    In half precision one channel would round |k|^2 too coarsely; two channels hold it and its rest.
    """
    norms = -_squared_norms(widen(k))
    columns = [norms.to(k.dtype)]
    if k.dtype.itemsize == 2:
        columns.append((norms - columns[0]).to(k.dtype))
    ones = q.new_ones(()).expand(*q.shape[:-1], len(columns))
    return torch.cat([2 * q, ones], -1), torch.cat([k, *columns], -1)


def _as_heads(x: Tensor, mixture: Tensor) -> Tensor:
    """[B, Q, D] -> [B, N, Q, d], the parts of every vector."""
    return x.unflatten(2, (mixture.shape[1], -1)).transpose(1, 2)


def _squared_norms(x: Tensor) -> Tensor:
    """[..., d] -> [..., 1]."""
    return x.square().sum(-1, keepdim=True)
