"""Squeeze Reasoning (SR, "Towards Efficient Scene Understanding via Squeeze Reasoning").

A map is squeezed into one vector, the vector is cut into nodes, a small graph reasons over them,
and the result reweights a reduced copy of the map. Nothing grows faster than the map itself.

Letters: B batch, C channels, p = C / reduction, H W map, K nodes, d = p / K features of a node.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from ctxops.checks import check_choice, check_divides, check_map, check_positive
from ctxops.init import kaiming_normal_
from ctxops.norm import make_norm
from ctxops.precision import autocast_off
from ctxops.squeeze import (
    POOLS,
    NodeAttention,
    NodeFC,
    NodeGraph,
    average_pool,
    hadamard_pool,
)

SQUEEZES = ("ghp", "gap")
REASONS = ("gcn", "sa", "fc", "none")
EXPANSIONS = ("grouped", "full")
# Groups of a GroupNorm by name, see `make_norm`.
GN_GROUPS = 32
# Names of the released module -> names here.
RELEASED_NAMES = {
    "t": "project",
    "p": "squeeze_b",
    "g": "squeeze_c",
    "z": "expand",
    "gn": "norm",
    "conv_adj": "reason.adjacency",
    "bn_adj": "reason.adjacency_norm",
    "conv_wg": "reason.transform",
    "bn_wg": "reason.transform_norm",
}


class SqueezeReasoning(nn.Module):
    """Y = X + N(W_R(W_t X * r)), r the reasoned vector (Eqs. 4 to 7).

    Squeeze: v = mean over the positions of W_b X * W_c X (`ghp`) or of W_b X (`gap`). Node n owns
    the channels n d .. n d + d - 1 of v, before and after the reasoning. All projections are 1x1
    convolutions without bias; vectors are in at least float32 under autocast. r is not squashed:
    its entries are 0 or positive.

    Deviation: the defaults average in Eq. 4 where a sum is printed (`pool`), normalise after W_R,
    A_g and W_g where nothing is shown (`norm`, `node_norm`), and reduce with a projection of its
    own in front of W_R (`wr`); only these give the printed parameters and costs.

    Args:
        in_channels: C.
        reduction: C / p.
        nodes: K, a divisor of p.
        squeeze: `ghp` or `gap`.
        pool: `mean`, or `sum` (the literal Eq. 4, of `ghp` only).
        reason: `gcn` (Eq. 5), `sa` (Eq. 6), `fc` (two linear layers) or `none`.
        adj: `paper` or `released`, see `NodeGraph`.
        wr: `grouped`: W_R scales channels, one group per channel of W_t X. `full`: W_R is dense and
            W_t = W_b.
        norm: N after W_R, as in `make_norm`; SyncBN equals BN in one process.
        node_norm: Norm inside `gcn`: `BN` (synchronised with `norm` SyncBN), `LN` or `""`.
        sa_softmax: False for the literal Eq. 6.
        zero_init: Start with Y = X, by a zero scale of the last norm (a zero W_R without a norm).

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a name is unknown, a width does not divide, `sum` is combined with `gap`, or
            a GroupNorm would cancel the vector (one reduced channel per group).
    """

    squeeze_c: nn.Conv2d | None
    project: nn.Conv2d | None

    def __init__(
        self,
        *,
        in_channels: int = 512,
        reduction: int = 2,
        nodes: int = 16,
        squeeze: str = "ghp",
        pool: str = "mean",
        reason: str = "gcn",
        adj: str = "paper",
        wr: str = "grouped",
        norm: str = "SyncBN",
        node_norm: str = "BN",
        sa_softmax: bool = True,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        check_choice(squeeze, "squeeze", SQUEEZES)
        check_choice(reason, "reason", REASONS)
        check_choice(wr, "wr", EXPANSIONS)
        _check_pool(pool, squeeze)
        reduced = _reduced_channels(in_channels, reduction, nodes)
        _check_groups(norm, wr, reduced)
        self.in_channels = in_channels
        self.nodes = nodes
        self.pool = pool
        self.interleaved = False
        self.squeeze_b = _pointwise(in_channels, reduced)
        self.squeeze_c = _pointwise(in_channels, reduced) if squeeze == "ghp" else None
        self.project = _pointwise(in_channels, reduced) if wr == "grouped" else None
        groups = reduced if wr == "grouped" else 1
        self.expand = _pointwise(reduced, in_channels, groups=groups)
        synced = "SyncBN" if (node_norm, norm) == ("BN", "SyncBN") else node_norm
        parts = {
            "gcn": lambda: NodeGraph(nodes=nodes, features=reduced // nodes, norm=synced, adj=adj),
            "sa": lambda: NodeAttention(features=reduced // nodes, softmax=sa_softmax),
            "fc": lambda: NodeFC(channels=reduced),
            "none": nn.Identity,
        }
        self.reason: nn.Module = parts[reason]()
        self.norm = make_norm(norm, in_channels, num_groups=GN_GROUPS)
        if zero_init:
            last = self.norm if norm else self.expand
            nn.init.zeros_(last.get_parameter("weight"))

    @classmethod
    def released(
        cls, *, in_channels: int = 512, reduction: int = 2, nodes: int = 32
    ) -> "SqueezeReasoning":
        """The module as released by the authors, for their weights and for comparison.

        It differs in five ways from the paper and the defaults: pooling sums; node n gathers the
        channels n, n + K, n + 2 K, ... but returns to n d .. n d + d - 1; z = G + ReLU(N(A_g G));
        32 nodes; GroupNorm with p groups. The last one divides W_t X * r by its own size in every
        group, so that of r little but its zeros remains.

        Args:
            in_channels: C.
            reduction: C / p.
            nodes: K.

        Returns:
            The module; `convert_released_state` translates the names of a released state.
        """
        module = cls(
            in_channels=in_channels,
            reduction=reduction,
            nodes=nodes,
            pool="sum",
            adj="released",
            norm="",
        )
        module.norm = nn.GroupNorm(in_channels // reduction, in_channels)
        module.interleaved = True
        return module

    def forward(self, x: Tensor) -> Tensor:
        """Reweight a reduced copy of the map with what the whole image says, and add it.

        Args:
            x: X [B, C, H, W].

        Returns:
            Y [B, C, H, W], in the dtype of `x`.

        Raises:
            TypeError: If `x` is not floating point.
            ValueError: If `x` is not [B, C, H, W] with the C of the module.
        """
        check_map(x, "x", channels=self.in_channels)
        reduced = self.squeeze_b(x)
        if self.squeeze_c is None:
            vector = average_pool(reduced)
        else:
            vector = hadamard_pool(reduced, self.squeeze_c(x), pool=self.pool)
        factors = self._reason(vector)[:, :, None, None].to(reduced.dtype)
        if self.project is not None:
            reduced = self.project(x)
        return x + self.norm(self.expand(reduced * factors)).to(x.dtype)

    def _reason(self, vector: Tensor) -> Tensor:
        """Squeezed [B, p] -> reasoned [B, p], in the dtype of the parameters."""
        with autocast_off(vector):
            vector = vector.to(self.expand.weight.dtype)
            if self.interleaved:
                nodes = vector.unflatten(1, (-1, self.nodes)).transpose(1, 2)  # [B, K, d]
            else:
                nodes = vector.unflatten(1, (self.nodes, -1))  # [B, K, d]
            return self.reason(nodes).flatten(1)


class SqueezeReasoningGate(nn.Module):
    """Squeeze-and-excitation whose two layers are graph reasoning (SR-ResNet, Table X).

    x * sigmoid(N(W_g (G - N(A_g G)))), G the average-pooled channels cut into K nodes. It stands
    on the last norm of a bottleneck, before the shortcut is added.

    Deviation: the paper does not name the last activation; the sigmoid is that of the SE block.

    Args:
        in_channels: C, a multiple of K.
        nodes: K.
        node_norm: N, as in `make_node_norm`.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If K does not divide C or `node_norm` is unknown.
    """

    def __init__(self, *, in_channels: int, nodes: int = 16, node_norm: str = "BN") -> None:
        super().__init__()
        reduced = _reduced_channels(in_channels, 1, nodes)
        self.in_channels = in_channels
        self.nodes = nodes
        self.reason = NodeGraph(
            nodes=nodes, features=reduced // nodes, norm=node_norm, act=nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels.

        Args:
            x: Map [B, C, H, W].

        Returns:
            Map [B, C, H, W], in the dtype of `x`.

        Raises:
            TypeError: If `x` is not floating point.
            ValueError: If `x` is not [B, C, H, W] with the C of the module.
        """
        check_map(x, "x", channels=self.in_channels)
        with autocast_off(x):
            vector = average_pool(x).to(self.reason.adjacency.weight.dtype)
            gate = self.reason(vector.unflatten(1, (self.nodes, -1))).flatten(1)  # [B, C]
        return x * gate[:, :, None, None].to(x.dtype)


def convert_released_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State of a released module under our names, for `SqueezeReasoning.released`.

    Args:
        state: State dict with the names t, p, g, z, gn, conv_adj, bn_adj, conv_wg, bn_wg.

    Returns:
        The same tensors, renamed.

    Raises:
        ValueError: If a name is none of the released module's.
    """
    renamed = {}
    for name, value in state.items():
        part, _, kind = name.partition(".")
        if part not in RELEASED_NAMES:
            raise ValueError(
                f"state: expected names beginning with {', '.join(RELEASED_NAMES)}, got {name!r}; "
                "cut the prefix of the module off first"
            )
        renamed[f"{RELEASED_NAMES[part]}.{kind}"] = value
    return renamed


def _pointwise(in_channels: int, out_channels: int, *, groups: int = 1) -> nn.Conv2d:
    return kaiming_normal_(nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=False))


def _reduced_channels(in_channels: int, reduction: int, nodes: int) -> int:
    """The number p, refusing what does not divide."""
    check_positive(in_channels, "in_channels")
    check_positive(reduction, "reduction")
    check_positive(nodes, "nodes")
    check_divides(reduction, in_channels, "reduction and in_channels")
    check_divides(nodes, in_channels // reduction, "nodes and reduced channels")
    return in_channels // reduction


def _check_pool(pool: str, squeeze: str) -> None:
    check_choice(pool, "pool", POOLS)
    if pool == "sum" and squeeze == "gap":
        raise ValueError(
            "pool: expected 'mean' with squeeze 'gap' (average pooling), got 'sum'; "
            "use squeeze='ghp' for the sum of Eq. 4"
        )


def _check_groups(norm: str, wr: str, reduced: int) -> None:
    """Refuse a GroupNorm that divides the vector out again."""
    if norm == "GN" and wr == "grouped" and reduced <= GN_GROUPS:
        raise ValueError(
            f"norm: expected fewer GN groups than reduced channels with wr 'grouped', got "
            f"{GN_GROUPS} groups for {reduced} channels: each group would normalise the reasoned "
            "factor away; use 'BN' or 'SyncBN', a smaller reduction, or wr='full'"
        )
