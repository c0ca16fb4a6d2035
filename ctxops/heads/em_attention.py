"""Expectation-maximisation attention unit, EMAU ("Expectation-Maximization Attention Networks").

A map is rebuilt from a few bases, which a few rounds of EM fit to the image. Where they start is no
parameter but a moving average, which the training loop advances with `update_bases`.

Letters: B batch, C channels, H W map, N = HW positions, K bases.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxops.checks import check_map, check_positive, check_probability
from ctxops.init import kaiming_normal_
from ctxops.norm import make_norm
from ctxops.precision import autocast_off, widen

# Keeps a basis that no position chose from dividing by zero.
EPS = 1e-6


def responsibilities(features: Tensor, bases: Tensor) -> Tensor:
    """E step: softmax over the bases of x . mu.

    Args:
        features: [B, C, N].
        bases: [B, C, K].

    Returns:
        Z [B, N, K]; every position sums to 1.
    """
    return (features.transpose(1, 2) @ bases).softmax(2)


def estimate_bases(features: Tensor, weights: Tensor) -> Tensor:
    """M step: means of the features, weighted by their responsibilities, of length 1.

    Args:
        features: [B, C, N].
        weights: Z [B, N, K].

    Returns:
        Bases [B, C, K].
    """
    means = features @ (weights / (EPS + weights.sum(1, keepdim=True)))
    return F.normalize(means, dim=1, eps=EPS)


class EMAttention(nn.Module):
    """y = ReLU(x + N(W_2 ReLU(mu Z^T))), bases mu and responsibilities Z of W_1 x.

    No gradient passes through the bases. It does pass through the last Z and from there into W_1.

    Deviation: the authors' code lets no gradient through Z either, which leaves W_1 untrained. The
    output is the same.

    Args:
        in_channels: C.
        num_bases: K.
        num_iterations: Rounds of EM.
        momentum: Weight of the old bases in `update_bases`.
        norm: N, as in `make_norm`.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is not positive, `momentum` not in [0, 1), or `norm` unknown.
    """

    bases: Tensor

    def __init__(
        self,
        *,
        in_channels: int,
        num_bases: int = 64,
        num_iterations: int = 3,
        momentum: float = 0.9,
        norm: str = "BN",
    ) -> None:
        super().__init__()
        check_positive(in_channels, "in_channels")
        check_positive(num_bases, "num_bases")
        check_positive(num_iterations, "num_iterations")
        check_probability(momentum, "momentum")
        self.in_channels = in_channels
        self.num_iterations = num_iterations
        self.momentum = momentum
        self.inner = kaiming_normal_(nn.Conv2d(in_channels, in_channels, 1))
        self.out = kaiming_normal_(nn.Conv2d(in_channels, in_channels, 1, bias=False))
        self.norm = make_norm(norm, in_channels)
        start = torch.randn(in_channels, num_bases) * math.sqrt(2 / num_bases)
        self.register_buffer("bases", F.normalize(start, dim=0, eps=EPS))
        self._estimate: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Rebuild the map from bases fitted to it, and add it.

        In training the bases found are remembered for `update_bases`.

        Args:
            x: Map [B, C, H, W].

        Returns:
            Map [B, C, H, W], in the dtype of `x`.

        Raises:
            TypeError: If `x` is not floating point.
            ValueError: If `x` is not [B, C, H, W] with the C of the module.
        """
        check_map(x, "x", channels=self.in_channels)
        inner = self.inner(x)
        with autocast_off(x):
            features = widen(inner).flatten(2)  # [B, C, N]
            bases, weights = self._fit(features)
            rebuilt = (bases @ weights.transpose(1, 2)).relu()  # [B, C, N]
        if self.training:
            self._estimate = bases.mean(0)
        update = self.out(rebuilt.unflatten(2, x.shape[2:]).to(inner.dtype))
        return (x + self.norm(update).to(x.dtype)).relu()

    def _fit(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Bases [B, C, K] without gradient; responsibilities [B, N, K] of the last round."""
        fixed = features.detach()
        bases = self.bases.to(features.dtype).expand(features.shape[0], -1, -1)
        for _ in range(self.num_iterations - 1):
            bases = estimate_bases(fixed, responsibilities(fixed, bases))
        weights = responsibilities(features, bases)
        return estimate_bases(fixed, weights.detach()), weights

    @torch.no_grad()
    def update_bases(self) -> None:
        """Move the start of EM towards the bases of the last training batch.

        To be called once per optimiser step. Averages over the processes where there are several.

        Raises:
            ValueError: If there was no forward pass in training mode since the last call.
        """
        if self._estimate is None:
            raise ValueError(
                "update_bases: expected a forward pass in training mode since the last update, got "
                "none; call it once per step, after the forward pass"
            )
        estimate, self._estimate = self._estimate, None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(estimate)
            estimate /= torch.distributed.get_world_size()
        self.bases.lerp_(estimate.to(self.bases.dtype), 1 - self.momentum)
