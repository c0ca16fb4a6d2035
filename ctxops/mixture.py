"""What the attention transformers of FPT have in common: projections, mixture weights, output.

Letters: B batch, C channels of a map, d width of queries, keys and values, H W map of the queries,
Hc Wc map of the keys, N parts.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from ctxops.attention import SIMILARITIES, mixture_weights
from ctxops.checks import check_choice, check_divides, check_positive, check_probability
from ctxops.init import fan_in_uniform_
from ctxops.norm import ConvNorm
from ctxops.precision import widened_dtype

PI_SOURCES = ("key", "query")
SCALES = ("sqrt", "none")


def pool_keys(x: Tensor, *, stride: int) -> Tensor:
    """Average over windows of 2 s - 1 pixels, s apart; the outside of the map does not count.

    Args:
        x: Map [B, C, H, W].
        stride: s; 1 changes nothing.

    Returns:
        Map [B, C, ceil(H / s), ceil(W / s)].
    """
    if stride == 1:
        return x
    return F.avg_pool2d(x, 2 * stride - 1, stride, padding=stride - 1, count_include_pad=False)


def logit_scale(scale: str | float, *, width: int) -> float:
    """The factor of every logit.

    Args:
        scale: `sqrt`, `none`, or the factor itself.
        width: d, of all parts together.

    Returns:
        1 / sqrt(d), 1, or the given factor.

    Raises:
        TypeError: If `scale` is neither a name nor a number.
        ValueError: If the name is unknown or the number not positive.
    """
    if isinstance(scale, str):
        check_choice(scale, "scale", SCALES)
        return 1 / math.sqrt(width) if scale == "sqrt" else 1.0
    if not isinstance(scale, int | float) or isinstance(scale, bool):
        raise TypeError(f"scale: expected 'sqrt', 'none' or a number, got {scale!r}; use 'sqrt'")
    if not scale > 0:
        raise ValueError(f"scale: expected a positive number, got {scale}; use 'sqrt'")
    return float(scale)


class MixtureWeights(nn.Module):
    """pi = softmax_n(w_n . mean_j k_j) with learnable w_n (FPT, Eq. 2); no parameters for N = 1.

    Args:
        channels: d.
        parts: N, a divisor of d.

    Raises:
        TypeError: If `parts` is not an integer.
        ValueError: If `parts` does not divide d.
    """

    weight: Parameter | None

    def __init__(self, *, channels: int, parts: int) -> None:
        super().__init__()
        check_positive(parts, "parts")
        check_divides(parts, channels, "parts and inner_channels")
        self.parts = parts
        self.register_parameter("weight", None)
        if parts > 1:
            bound = parts**-0.5
            self.weight = Parameter(torch.empty(parts, channels).uniform_(-bound, bound))

    def forward(self, vectors: Tensor) -> Tensor:
        """Weights of the parts, one set per image.

        Args:
            vectors: Keys (or queries) of all positions, map [B, d, H, W].

        Returns:
            pi, [B, N], in float32 or wider; sums to 1 over N.
        """
        if self.weight is None:
            return vectors.new_ones(vectors.shape[0], 1, dtype=widened_dtype(vectors.dtype))
        mean = vectors.mean((2, 3), dtype=widened_dtype(vectors.dtype))  # [B, d]
        return mixture_weights(mean, self.weight)


class MixtureTransformer(nn.Module):
    """Base: query, key and value projections, mixture weights, output convolution with a norm.

    Args:
        channels: C.
        inner_channels: d; None: C.
        parts: N, a divisor of d.
        similarity: `dot` or `euclidean` (-|q - k|^2).
        scale: Factor of the logits: `sqrt` for 1 / sqrt(d), `none` for 1, or a number.
        pi_from: The vectors whose mean gives pi, `key` or `query`.
        attn_dropout: Dropout of the weights of every part before mixing, in training.
        norm: Of the output convolution, as in `make_norm`.
        bias: Whether the projections have biases.
        share_qk: One convolution for queries and keys.
        zero_gamma: Start with the scale of the norm at zero, so that the output is zero.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a name is unknown, a number impossible, or there is no norm to zero.
    """

    def __init__(
        self,
        *,
        channels: int,
        inner_channels: int | None,
        parts: int,
        similarity: str,
        scale: str | float,
        pi_from: str,
        attn_dropout: float,
        norm: str,
        bias: bool = True,
        share_qk: bool = False,
        zero_gamma: bool = False,
    ) -> None:
        super().__init__()
        width = channels if inner_channels is None else inner_channels
        check_positive(channels, "channels")
        check_positive(width, "inner_channels")
        check_choice(similarity, "similarity", SIMILARITIES)
        check_choice(pi_from, "pi_from", PI_SOURCES)
        check_probability(attn_dropout, "attn_dropout")
        self.channels = channels
        self.similarity = similarity
        self.scale = logit_scale(scale, width=width)
        self.pi_from = pi_from
        self.attn_dropout = attn_dropout
        self.query = _projection(channels, width, bias)
        self.key = None if share_qk else _projection(channels, width, bias)
        self.value = _projection(channels, width, bias)
        self.mixture = MixtureWeights(channels=width, parts=parts)
        self.output = ConvNorm(
            in_channels=width, out_channels=channels, kernel_size=1, norm=norm, act=False
        )
        if zero_gamma:
            _zero_scale(self.output.norm)

    @property
    def dropout_p(self) -> float:
        """Probability of dropping an attention weight: 0 in evaluation mode."""
        return self.attn_dropout if self.training else 0.0

    def project(self, fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries of one map, keys and values of another, and the weights of the parts.

        Args:
            fine: Map [B, C, H, W].
            coarse: Map [B, C, Hc, Wc].

        Returns:
            Query [B, d, H, W], key and value [B, d, Hc, Wc], pi [B, N].
        """
        query = self.query(fine)
        key = self.query(coarse) if self.key is None else self.key(coarse)
        pi = self.mixture(key if self.pi_from == "key" else query)
        return query, key, self.value(coarse), pi

    def extra_repr(self) -> str:
        """What `print` shows."""
        return (
            f"parts={self.mixture.parts}, similarity={self.similarity}, scale={self.scale:.4g}, "
            f"pi_from={self.pi_from}, attn_dropout={self.attn_dropout}"
        )


def _projection(channels: int, width: int, bias: bool) -> nn.Conv2d:
    return fan_in_uniform_(nn.Conv2d(channels, width, 1, bias=bias))


def _zero_scale(norm: nn.Module) -> None:
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(
            "zero_gamma: expected a norm whose scale can start at zero, got norm=''; "
            "use 'GN', 'SyncBN' or 'BN'"
        )
    nn.init.zeros_(weight)
