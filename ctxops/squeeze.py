"""Squeeze a map into one vector and reason over its nodes (Squeeze Reasoning, section III-B).

The vector of p numbers is cut into K nodes of d features. What is here knows nothing of maps beyond
pooling, so that the same reasoning serves a segmentation head and the gate of a classifier.

Letters: B batch, p channels of the reduced map, H W map, K nodes, d features of a node, p = K d.
"""

from torch import Tensor, nn

from ctxops.checks import check_choice, check_divides, check_map, check_positive
from ctxops.init import kaiming_normal_
from ctxops.precision import widen, widened_dtype

POOLS = ("mean", "sum")
NODE_NORMS = ("BN", "SyncBN", "LN", "")
ADJACENCIES = ("paper", "released")
# The fully connected reasoning narrows the vector by this factor, as a squeeze-and-excitation does.
FC_REDUCTION = 16


def average_pool(x: Tensor) -> Tensor:
    """Global average pooling, GAP.

    Args:
        x: Map [B, p, H, W].

    Returns:
        Vectors [B, p] in at least float32.

    Raises:
        TypeError: If `x` is not floating point.
        ValueError: If `x` has not four axes.
    """
    check_map(x, "x")
    return x.mean((2, 3), dtype=widened_dtype(x.dtype))


def hadamard_pool(b: Tensor, c: Tensor, *, pool: str = "mean") -> Tensor:
    """Global Hadamard pooling, GHP: b * c, averaged or summed over the positions (Eq. 4).

    Deviation: Eq. 4 prints a sum. It grows with the map, so that a model trained on crops behaves
    differently on whole images, and it leaves the range of float16; the mean is the default.

    Args:
        b: Map [B, p, H, W].
        c: Map [B, p, H, W].
        pool: `mean`, or `sum` for the literal equation.

    Returns:
        Vectors [B, p] in at least float32; both maps are widened before the product.

    Raises:
        TypeError: If a map is not floating point.
        ValueError: If the maps differ in shape or `pool` is unknown.
    """
    check_choice(pool, "pool", POOLS)
    check_map(b, "b")
    check_map(c, "c")
    if b.shape != c.shape:
        raise ValueError(
            f"b and c: expected maps of one shape, got {tuple(b.shape)} and {tuple(c.shape)}; "
            "project the same map to the same width"
        )
    product = widen(b) * widen(c)
    return product.mean((2, 3)) if pool == "mean" else product.sum((2, 3))


def node_attention(query: Tensor, key: Tensor, value: Tensor, *, softmax: bool = True) -> Tensor:
    """Values mixed with the affinity of the nodes, rho [phi^T theta] (Eq. 6 without its ReLU).

    Deviation: Eq. 6 shows no softmax; without one the mixture grows with the third power of the
    vector. It runs over the node that is summed over.

    Args:
        query: phi(G), nodes as columns [B, d, K].
        key: theta(G), [B, d, K].
        value: rho(G), [B, d, K].
        softmax: False for the literal equation.

    Returns:
        Mixed nodes [B, d, K].
    """
    affinity = query.transpose(1, 2) @ key  # [B, K summed, K]
    return value @ (affinity.softmax(1) if softmax else affinity)


def make_node_norm(norm: str, channels: int) -> nn.Module:
    """The normalisation of nodes [B, channels, n], of one scale and shift per channel.

    Args:
        norm: `BN`, `SyncBN`, `LN` (one group: the statistics of all nodes and features of an image;
            over the features alone little but signs would remain where d is small) or `""`.
        channels: Number of rows that get a scale and a shift of their own.

    Returns:
        A module that keeps the shape.

    Raises:
        ValueError: If `norm` is unknown.
    """
    check_choice(norm, "node_norm", NODE_NORMS)
    if norm == "BN":
        return nn.BatchNorm1d(channels)
    if norm == "SyncBN":
        return nn.SyncBatchNorm(channels)
    return nn.GroupNorm(1, channels) if norm == "LN" else nn.Identity()


class NodeGraph(nn.Module):
    """Reasoning with a learned adjacency: act(N(W_g z)), z = G - N(A_g G) (Eq. 5, "GCN").

    A_g is a 1x1 convolution across the nodes, W_g one across the features. Without a norm this is
    literally sigma(W_g G (I - A_g)).

    Args:
        nodes: K.
        features: d.
        norm: N, as in `make_node_norm`.
        adj: `paper`, or `released` for z = G + ReLU(N(A_g G)).
        act: The last activation; None for the ReLU of Eq. 5.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is not positive, or `norm` or `adj` unknown.
    """

    def __init__(
        self,
        *,
        nodes: int,
        features: int,
        norm: str = "BN",
        adj: str = "paper",
        act: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_positive(nodes, "nodes")
        check_positive(features, "features")
        check_choice(adj, "adj", ADJACENCIES)
        self.adj = adj
        self.adjacency = nn.Conv1d(nodes, nodes, 1, bias=False)
        self.adjacency_norm = make_node_norm(norm, nodes)
        self.transform = nn.Conv1d(features, features, 1, bias=False)
        self.transform_norm = make_node_norm(norm, features)
        self.act = nn.ReLU() if act is None else act

    def forward(self, nodes: Tensor) -> Tensor:
        """Exchange information between the nodes.

        Args:
            nodes: G [B, K, d].

        Returns:
            Nodes [B, K, d].
        """
        message = self.adjacency_norm(self.adjacency(nodes))
        mixed = nodes - message if self.adj == "paper" else nodes + message.relu()
        transformed = self.transform(mixed.transpose(1, 2))  # [B, d, K]
        return self.act(self.transform_norm(transformed)).transpose(1, 2)


class NodeAttention(nn.Module):
    """Reasoning with the correlation of the nodes: ReLU(rho(G) [phi(G)^T theta(G)]) (Eq. 6, "SA").

    Equivariant to a permutation of the nodes. No residual and no scaling, as printed.

    Args:
        features: d.
        softmax: False for the literal equation, see `node_attention`.

    Raises:
        TypeError: If `features` is not an integer.
        ValueError: If `features` is not positive.
    """

    def __init__(self, *, features: int, softmax: bool = True) -> None:
        super().__init__()
        check_positive(features, "features")
        self.softmax = softmax
        self.query = nn.Conv1d(features, features, 1, bias=False)
        self.key = nn.Conv1d(features, features, 1, bias=False)
        self.value = nn.Conv1d(features, features, 1, bias=False)

    def forward(self, nodes: Tensor) -> Tensor:
        """Mix the nodes with their own affinity.

        Args:
            nodes: G [B, K, d].

        Returns:
            Nodes [B, K, d].
        """
        columns = nodes.transpose(1, 2)  # [B, d, K]
        mixed = node_attention(
            self.query(columns), self.key(columns), self.value(columns), softmax=self.softmax
        )
        return mixed.relu().transpose(1, 2)


class NodeFC(nn.Module):
    """Reasoning with two fully connected layers over the whole vector, p -> p/16 -> p ("FC").

    A ReLU after each, no biases; the cut into nodes plays no role.

    Args:
        channels: p, a multiple of 16.

    Raises:
        TypeError: If `channels` is not an integer.
        ValueError: If `channels` is not a multiple of 16.
    """

    def __init__(self, *, channels: int) -> None:
        super().__init__()
        check_positive(channels, "channels")
        check_divides(FC_REDUCTION, channels, "reduction of 'fc' and reduced channels")
        hidden = channels // FC_REDUCTION
        self.reduce = kaiming_normal_(nn.Linear(channels, hidden, bias=False))
        self.expand = kaiming_normal_(nn.Linear(hidden, channels, bias=False))

    def forward(self, nodes: Tensor) -> Tensor:
        """Transform the vector behind the nodes.

        Args:
            nodes: G [B, K, d].

        Returns:
            Nodes [B, K, d].
        """
        vector = self.expand(self.reduce(nodes.flatten(1)).relu()).relu()
        return vector.view_as(nodes)
