"""What the processes of a training run send each other, computed from the model alone.

Letters: n processes, P trainable parameters, C channels of a norm, K classes. Bytes are those that
one process sends, as many as it receives, with ring algorithms, as NCCL and gloo use them:

    all-reduce of b bytes                       2 (n - 1) / n * b
    all-gather into b, reduce-scatter of b        (n - 1) / n * b
"""

from dataclasses import dataclass

from torch import nn

FLOAT, INTEGER = 4, 8  # bytes
_BATCH_NORMS = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True, kw_only=True)
class Network:
    """What the costs of a model depend on.

    Attributes:
        parameters: P.
        buffers: Numbers in buffers, such as running statistics.
        norms: C of every batch norm that trains.
    """

    parameters: int
    buffers: int
    norms: tuple[int, ...]

    @classmethod
    def of(cls, model: nn.Module) -> "Network":
        """Look at a model, which may be without memory (`meta`)."""
        norms = [m for m in model.modules() if isinstance(m, _BATCH_NORMS)]
        return cls(
            parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            buffers=sum(b.numel() for b in model.buffers()),
            norms=tuple(norm.num_features for norm in norms),
        )


def all_reduce(size: float, processes: int) -> float:
    """Bytes that a process sends to sum `size` bytes over all."""
    return 2 * (processes - 1) / processes * size


def all_gather(size: float, processes: int) -> float:
    """Bytes that a process sends so that all have the whole of `size` bytes."""
    return (processes - 1) / processes * size


def gradients(network: Network, processes: int) -> float:
    """Of an update with DDP: one sum of float32 gradients, however many passes it has."""
    return all_reduce(FLOAT * network.parameters, processes)


def synced_norms(network: Network, processes: int) -> float:
    """Of a forward and backward pass with synchronised batch norms.

    Forward, every process gathers mean, deviation and count (2C + 1 numbers) of each; backward, two
    sums of C are summed.
    """
    forward = sum(all_gather(FLOAT * (2 * c + 1) * processes, processes) for c in network.norms)
    backward = sum(all_reduce(FLOAT * 2 * c, processes) for c in network.norms)
    return forward + backward


def buffers(network: Network, processes: int) -> float:
    """Of a forward pass of segtrain's DDP, which passes the buffers of process 0 on along a chain.

    Detectron2 sends none.
    """
    return FLOAT * network.buffers if processes > 1 else 0.0


def shards(network: Network, processes: int, *, weight_bytes: int = FLOAT) -> float:
    """Of a forward and backward pass with FSDP2.

    Weights are gathered for each of both, gradients are summed and scattered in float32.
    """
    weights = 2 * all_gather(weight_bytes * network.parameters, processes)
    return weights + all_gather(FLOAT * network.parameters, processes)


def evaluation(classes: int, processes: int, *, detailed: bool = False) -> float:
    """Of one evaluation: confusion matrix and void; with details class sizes and boundaries."""
    numbers = classes * classes + 1 + (6 * classes if detailed else 0)
    return all_reduce(INTEGER * numbers, processes)


@dataclass(frozen=True, kw_only=True)
class Link:
    """What was measured of a connection, with all-reduces of several sizes.

    Attributes:
        latency: Seconds of a tiny one.
        bandwidth: Bytes per second that a process sends in a large one.
    """

    latency: float
    bandwidth: float

    def seconds(self, sent: float, *, messages: int = 1) -> float:
        """Time of so many bytes in so many messages, if nothing else happens meanwhile."""
        return messages * self.latency + sent / self.bandwidth


def fit(times: dict[int, float], processes: int) -> Link:
    """Latency and bandwidth of measured all-reduces.

    Args:
        times: Bytes that are summed -> seconds.
        processes: n.

    Returns:
        The time of the smallest, and the bandwidth between the smallest and the largest.

    Raises:
        ValueError: If there are not two sizes, or the larger one was not slower.
    """
    small, large = min(times), max(times)
    if times[large] <= times[small]:
        raise ValueError(
            f"expected all-reduces of two sizes, the larger one slower, got {times}; measure again"
        )
    sent = all_reduce(large - small, processes)
    return Link(latency=times[small], bandwidth=sent / (times[large] - times[small]))
