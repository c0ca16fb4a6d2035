"""Self-Transformer, Grounding Transformer and its locality-constrained form (FPT, 3.2 and 3.3).

All three average values with a mixture of softmaxes: queries and keys are split along their
channels into N parts, each part has a softmax over the keys of its own, and pi, one set of N
weights per image, mixes them. The values are not split.

The mean behind pi, the softmax and the norms see every position of a map, also the padding of a
batch of images of unequal size: results depend slightly on what an image is batched with.

Letters: B batch, C channels of a map, d width of queries, keys and values, H W (fine) map, Hc Wc
coarse map, N parts.
"""

from torch import Tensor

from ctxops.attention import IMPLS, mixture_attention
from ctxops.checks import check_choice, check_map, check_odd, check_positive
from ctxops.local_attention import IMPLS as LOCAL_IMPLS
from ctxops.local_attention import local_mixture_attention
from ctxops.mixture import MixtureTransformer, pool_keys


class SelfTransformer(MixtureTransformer):
    """ST: non-local interaction inside one level, by the mixture of softmaxes (FPT, Eqs. 2, 3).

    out = x + norm(W_o sum_j F_mos(q_i, k_j) v_j).

    Deviation: the paper names neither the output convolution with its norm nor the residual, the
    released code has both.

    Args:
        channels: C.
        inner_channels: d; None: C.
        parts: N, a divisor of d.
        similarity: `dot` or `euclidean` (-|q - k|^2).
        scale: Factor of the logits: `sqrt` for 1 / sqrt(d), `none` for 1, or a number.
        pi_from: The vectors whose mean gives pi, `key` or `query`.
        share_qk: One convolution for queries and keys.
        kv_pool: s: keys and values are made of the map averaged by `pool_keys`. 1 is exact; 2
            leaves a quarter of the positions.
        attn_dropout: Dropout of the weights of every part before mixing, in training.
        norm: As in `make_norm`.
        impl: How `mixture_attention` computes.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a name is unknown or a number impossible.
    """

    def __init__(
        self,
        *,
        channels: int,
        inner_channels: int | None = None,
        parts: int = 2,
        similarity: str = "dot",
        scale: str | float = "sqrt",
        pi_from: str = "key",
        share_qk: bool = False,
        kv_pool: int = 1,
        attn_dropout: float = 0.0,
        norm: str = "GN",
        impl: str = "auto",
    ) -> None:
        check_positive(kv_pool, "kv_pool")
        check_choice(impl, "impl", IMPLS)
        super().__init__(
            channels=channels,
            inner_channels=inner_channels,
            parts=parts,
            similarity=similarity,
            scale=scale,
            pi_from=pi_from,
            attn_dropout=attn_dropout,
            norm=norm,
            share_qk=share_qk,
        )
        self.kv_pool = kv_pool
        self.impl = impl

    def forward(self, x: Tensor) -> Tensor:
        """Let every position gather from all positions of its level.

        Args:
            x: Map [B, C, H, W].

        Returns:
            Map [B, C, H, W].

        Raises:
            TypeError: If `x` is not floating point.
            ValueError: If `x` is not [B, C, H, W] with the C of the module.
        """
        check_map(x, "x", channels=self.channels)
        gathered = _attend(self, x, pool_keys(x, stride=self.kv_pool))
        return x + self.output(gathered)


class GroundingTransformer(MixtureTransformer):
    """GT: positions of a fine level gather concepts of a coarse one (FPT, Eqs. 4, 5).

    out = norm(W_o sum_j F_mos(-|q_i - k_j|^2) v_j); no residual.

    Deviation: the squared distances are multiplied by `scale`; the paper gives none.

    Args:
        channels: C.
        inner_channels: d; None: C.
        parts: N, a divisor of d.
        similarity: `euclidean` (-|q - k|^2) or `dot`.
        scale: Factor of the logits: `sqrt` for 1 / sqrt(d), `none` for 1, or a number.
        pi_from: The vectors whose mean gives pi, `key` or `query`.
        zero_gamma: Start with the scale of the norm at zero, so that the output is zero.
        attn_dropout: Dropout of the weights of every part before mixing, in training.
        norm: As in `make_norm`.
        impl: How `mixture_attention` computes.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a name is unknown, a number impossible, or there is no norm to zero.
    """

    def __init__(
        self,
        *,
        channels: int,
        inner_channels: int | None = None,
        parts: int = 4,
        similarity: str = "euclidean",
        scale: str | float = "sqrt",
        pi_from: str = "key",
        zero_gamma: bool = False,
        attn_dropout: float = 0.0,
        norm: str = "GN",
        impl: str = "auto",
    ) -> None:
        check_choice(impl, "impl", IMPLS)
        super().__init__(
            channels=channels,
            inner_channels=inner_channels,
            parts=parts,
            similarity=similarity,
            scale=scale,
            pi_from=pi_from,
            attn_dropout=attn_dropout,
            norm=norm,
            zero_gamma=zero_gamma,
        )
        self.impl = impl

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Ground the coarse map's concepts in the fine map's positions.

        Args:
            fine: Map [B, C, H, W].
            coarse: Map [B, C, Hc, Wc], of any size.

        Returns:
            Map [B, C, H, W].

        Raises:
            TypeError: If a map is not floating point.
            ValueError: If the maps do not have the C of the module and one batch size.
        """
        _check_pair(fine, coarse, self.channels)
        return self.output(_attend(self, fine, coarse))


class LocalGroundingTransformer(MixtureTransformer):
    """LGT: a GT that looks at a window around each position (FPT, 3.3).

    Outside the map keys and values are zero and take part in the softmax. The projections have no
    biases, so that padding after them equals projecting zeros. pi averages real positions only.

    Deviation: `scale`, as in `GroundingTransformer`.

    Args:
        channels: C.
        window: Side of the window, odd.
        inner_channels: d; None: C.
        parts: N, a divisor of d.
        similarity: `euclidean` (-|q - k|^2) or `dot`.
        scale: Factor of the logits: `sqrt` for 1 / sqrt(d), `none` for 1, or a number.
        pi_from: The vectors whose mean gives pi, `key` or `query`.
        zero_gamma: Start with the scale of the norm at zero, so that the output is zero.
        attn_dropout: Dropout of the weights of every part before mixing, in training.
        norm: As in `make_norm`.
        impl: How `local_mixture_attention` computes.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a name is unknown, a number impossible, or there is no norm to zero.
    """

    def __init__(
        self,
        *,
        channels: int,
        window: int = 5,
        inner_channels: int | None = None,
        parts: int = 4,
        similarity: str = "euclidean",
        scale: str | float = "sqrt",
        pi_from: str = "key",
        zero_gamma: bool = False,
        attn_dropout: float = 0.0,
        norm: str = "GN",
        impl: str = "auto",
    ) -> None:
        check_odd(window, "window")
        check_choice(impl, "impl", LOCAL_IMPLS)
        super().__init__(
            channels=channels,
            inner_channels=inner_channels,
            parts=parts,
            similarity=similarity,
            scale=scale,
            pi_from=pi_from,
            attn_dropout=attn_dropout,
            norm=norm,
            zero_gamma=zero_gamma,
            bias=False,
        )
        self.window = window
        self.impl = impl

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Ground the coarse map's concepts in the fine map's positions.

        Args:
            fine: Map [B, C, H, W].
            coarse: Map [B, C, H, W], of the same size.

        Returns:
            Map [B, C, H, W].

        Raises:
            TypeError: If a map is not floating point.
            ValueError: If the maps do not have the C of the module, one batch size and one size.
        """
        _check_pair(fine, coarse, self.channels)
        if fine.shape != coarse.shape:
            raise ValueError(
                f"fine and coarse: expected maps of one size, got {tuple(fine.shape[2:])} and "
                f"{tuple(coarse.shape[2:])}; use GroundingTransformer for a pyramid of sizes"
            )
        query, key, value, pi = self.project(fine, coarse)
        out = local_mixture_attention(
            query,
            key,
            value,
            pi,
            window=self.window,
            similarity=self.similarity,
            scale=self.scale,
            dropout_p=self.dropout_p,
            impl=self.impl,
        )
        return self.output(out)


def _attend(
    module: "SelfTransformer | GroundingTransformer", fine: Tensor, coarse: Tensor
) -> Tensor:
    """Every position of the fine map looks at every position of the coarse one; [B, d, H, W]."""
    query, key, value, pi = module.project(fine, coarse)
    out = mixture_attention(
        _tokens(query),
        _tokens(key),
        _tokens(value),
        pi,
        similarity=module.similarity,
        scale=module.scale,
        dropout_p=module.dropout_p,
        impl=module.impl,
    )
    return out.transpose(1, 2).unflatten(2, fine.shape[2:])


def _tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, HW, C]."""
    return x.flatten(2).transpose(1, 2)


def _check_pair(fine: Tensor, coarse: Tensor, channels: int) -> None:
    check_map(fine, "fine", channels=channels)
    check_map(coarse, "coarse", channels=channels)
    if fine.shape[0] != coarse.shape[0]:
        raise ValueError(
            f"fine and coarse: expected one batch size, got {fine.shape[0]} and "
            f"{coarse.shape[0]}; pass two levels of one pyramid"
        )
