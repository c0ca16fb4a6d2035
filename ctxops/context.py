"""Multi-level global context, MGC (A²-FPN, section 3.1): collect, reason, distribute.

Letters: B batch, C_l channels of level l, c width of a context vector, D pyramid width, H W map,
L levels, n_l context vectors of level l, n all context vectors.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ctxops.checks import check_map, check_positive, check_pyramid
from ctxops.context_passes import AttendedMeans, Distribution
from ctxops.graph import GraphReasoning
from ctxops.init import conv2d
from ctxops.lateral import PyramidLateral, level_names
from ctxops.plain import are_plain
from ctxops.precision import autocast_off, widen
from ctxops.similarity import l2_normalize, scaled_cosine_attention


def orthogonal_penalty(weight: Tensor) -> Tensor:
    """Squared Frobenius norm ||W W^T - I||_F^2 (Eq. 2 without its factor lambda).

    With more rows than columns the rows cannot all be orthogonal: the penalty is then at least
    rows - columns, reached by orthonormal columns, and still pushes towards them.

    Args:
        weight: W [rows, columns].

    Returns:
        Scalar in float32 or wider.
    """
    with autocast_off(weight):
        w = widen(weight)
        eye = torch.eye(w.shape[0], dtype=w.dtype, device=w.device)
        return (w @ w.t() - eye).square().sum()


class ContextCollector(nn.Module):
    """G = W_phi F softmax_hw(sqrt(C) W_psi Norm(F))^T (A²-FPN, Eq. 1).

    The softmax runs over the positions, so the bias of psi cancels and gets no gradient.

    Args:
        in_channels: C of the map.
        num_contexts: Number of vectors to collect.
        context_channels: c.
    """

    def __init__(self, *, in_channels: int, num_contexts: int, context_channels: int) -> None:
        super().__init__()
        check_positive(in_channels, "in_channels")
        check_positive(num_contexts, "num_contexts")
        check_positive(context_channels, "context_channels")
        self.in_channels = in_channels
        self.psi = conv2d(in_channels, num_contexts, 1)
        nn.init.orthogonal_(self.psi.weight)
        self.phi = conv2d(in_channels, context_channels, 1)

    def attention_logits(self, x: Tensor) -> Tensor:
        """Scaled cosine of every position to every semantic entity (a row of W_psi).

        Args:
            x: Map [B, C, H, W].

        Returns:
            Logits [B, n_l, H, W], in float32 or wider; blind to the length of a pixel's vector.
        """
        with autocast_off(x):
            unit = l2_normalize(x, dim=1).to(self.psi.weight.dtype)
            return math.sqrt(self.in_channels) * widen(self.psi(unit))

    def forward(self, x: Tensor) -> Tensor:
        """Collect context vectors from one level.

        Args:
            x: Backbone map [B, C, H, W].

        Returns:
            Context vectors [B, c, n_l].

        Raises:
            TypeError: If `x` is not floating point.
            ValueError: If `x` is not [B, C, H, W] with the C of the module.
        """
        check_map(x, "x", channels=self.in_channels)
        if are_plain(x, self.psi, self.phi):
            return self._by_passes(x)
        values = self.phi(x).flatten(2)  # [B, c, HW]
        mask = self.attention_logits(x).flatten(2).softmax(-1)  # [B, n_l, HW]
        return values @ mask.to(values.dtype).transpose(1, 2)

    def _by_passes(self, x: Tensor) -> Tensor:
        """The same numbers, see `context_passes`."""
        flat, scale = x.flatten(2).contiguous(), math.sqrt(self.in_channels)
        means = AttendedMeans.apply(flat, self.psi.weight.flatten(1), self.psi.bias, scale)
        contexts: Tensor = self.phi.weight.flatten(1) @ means
        return contexts + cast(Tensor, self.phi.bias)[:, None]

    def orthogonal_penalty(self) -> Tensor:
        """Distance of the semantic entities from an orthonormal set (Eq. 2).

        Returns:
            Scalar ||W_psi W_psi^T - I||_F^2.
        """
        return orthogonal_penalty(self.psi.weight.flatten(1))


class ContextDistributor(nn.Module):
    """P = W_o G~ CF(W_theta F, G~, c) + W_xi F (A²-FPN, Eq. 6).

    Every pixel attends to all context vectors of all levels; they are keys and values at once.

    Args:
        in_channels: C of the map.
        context_channels: c.
        out_channels: D.
        normalize_query: False gives the literal Eq. 3, see `scaled_cosine_attention`.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        context_channels: int,
        out_channels: int,
        normalize_query: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.normalize_query = normalize_query
        self.theta = conv2d(in_channels, context_channels, 1)
        self.out = conv2d(context_channels, out_channels, 1)
        self.xi = conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, contexts: Tensor) -> Tensor:
        """Give every pixel the context it asks for.

        Args:
            x: Backbone map [B, C, H, W].
            contexts: Context vectors of all levels [B, c, n].

        Returns:
            Map [B, D, H, W].

        Raises:
            TypeError: If `x` is not floating point.
            ValueError: If the shapes do not fit the module.
        """
        check_map(x, "x", channels=self.in_channels)
        if are_plain(x, self.theta, self.out, self.xi):
            return self._by_passes(x, contexts)
        query = self.theta(x)
        bank = contexts.transpose(1, 2)  # [B, n, c]
        received = scaled_cosine_attention(
            query.flatten(2).transpose(1, 2),
            bank,
            bank,
            normalize_query=self.normalize_query,
        )
        context_map = received.transpose(1, 2).reshape(query.shape)  # [B, c, H, W]
        return self.out(context_map) + self.xi(x)

    def _by_passes(self, x: Tensor, contexts: Tensor) -> Tensor:
        """The same numbers, see `context_passes`."""
        layers = (self.theta.weight.flatten(1), self.theta.bias, self.xi.weight.flatten(1))
        flat = Distribution.apply(
            x.flatten(2).contiguous(),
            math.sqrt(contexts.shape[1]) * l2_normalize(contexts.transpose(1, 2), dim=-1),
            self.out.weight.flatten(1) @ contexts,
            *layers,
            cast(Tensor, self.out.bias) + cast(Tensor, self.xi.bias),
            self.normalize_query,
        )
        out: Tensor = flat.unflatten(2, x.shape[2:])
        return out


class MultiLevelContext(PyramidLateral):
    """MGC: collect context per level, reason per level and over all, distribute (Eqs. 1 to 6).

    Args:
        in_channels: C_l per level, fine to coarse.
        out_channels: D.
        num_contexts: n_l per level, fine to coarse.
        context_channels: c, a multiple of 4 where there are graph convolutions.
        gcn: False drops all graph convolutions (Table 3, "w/o GCN").
        normalize_query: False gives the literal Eq. 3, see `scaled_cosine_attention`.
        ortho_weight: lambda_o of Eq. 2; 0 switches the loss off.

    Raises:
        ValueError: If there are fewer than two levels, or not one n_l per level.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        out_channels: int,
        num_contexts: Sequence[int],
        context_channels: int = 256,
        gcn: bool = True,
        normalize_query: bool = True,
        ortho_weight: float = 1e-4,
    ) -> None:
        super().__init__(in_channels=in_channels)
        if len(num_contexts) != len(in_channels):
            raise ValueError(
                f"num_contexts: expected {len(in_channels)} numbers, one per level, "
                f"got {list(num_contexts)}; pass one per entry of in_channels"
            )
        self.ortho_weight = ortho_weight
        names = level_names(len(in_channels))
        self.collect = nn.ModuleDict()
        self.reason = nn.ModuleDict()
        self.distribute = nn.ModuleDict()
        for name, channels, count in zip(names, in_channels, num_contexts, strict=True):
            self.collect[name] = ContextCollector(
                in_channels=channels, num_contexts=count, context_channels=context_channels
            )
            self.distribute[name] = ContextDistributor(
                in_channels=channels,
                context_channels=context_channels,
                out_channels=out_channels,
                normalize_query=normalize_query,
            )
        for name in [*names, "all"] if gcn else []:
            self.reason[name] = GraphReasoning(
                channels=context_channels, normalize_query=normalize_query
            )

    def contexts(self, features: Sequence[Tensor]) -> Tensor:
        """Collected and reasoned context vectors G~ (Eqs. 1, 4, 5).

        Args:
            features: L maps [B, C_l, H_l, W_l], fine to coarse.

        Returns:
            Context vectors of all levels [B, c, n], in the order of the levels.
        """
        per_level = []
        for (name, collect), x in zip(self.collect.items(), features, strict=True):
            collected = collect(x)
            per_level.append(self.reason[name](collected) if self.reason else collected)
        everything = torch.cat(per_level, dim=2)
        return self.reason["all"](everything) if self.reason else everything

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Context-rich maps of all levels.

        Args:
            features: L maps [B, C_l, H_l, W_l], fine to coarse.

        Returns:
            L maps P^lc [B, D, H_l, W_l].

        Raises:
            TypeError: If a level is not a floating point map.
            ValueError: If levels, channels or sizes do not fit.
        """
        check_pyramid(features, self.in_channels)
        contexts = self.contexts(features)
        levels = zip(self.distribute.values(), features, strict=True)
        return [distribute(x, contexts) for distribute, x in levels]

    def aux_losses(self) -> dict[str, Tensor]:
        """The orthogonal regularisation of Eq. 2, summed over the levels.

        Returns:
            {"loss_orthogonal": scalar}, or nothing where its weight is 0.
        """
        if self.ortho_weight == 0:
            return {}
        collectors = [module for module in self.modules() if isinstance(module, ContextCollector)]
        penalties = [collector.orthogonal_penalty() for collector in collectors]
        return {"loss_orthogonal": self.ortho_weight * torch.stack(penalties).sum()}
