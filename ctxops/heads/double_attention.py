"""Double attention block, A² ("A²-Nets: Double Attention Networks"): gather, then distribute.

Letters: B batch, C channels, H W map, m width of a descriptor, n number of descriptors.
"""

from torch import Tensor, nn

from ctxops.checks import check_map, check_positive
from ctxops.init import kaiming_normal_
from ctxops.norm import make_norm
from ctxops.precision import autocast_off, widen


def double_attention(features: Tensor, gather: Tensor, distribute: Tensor) -> Tensor:
    """Z = [A softmax_HW(B)^T] softmax_n(V) (section 3.3).

    The two softmaxes differ: every descriptor is a mean over the positions, every position receives
    a mean over the descriptors. In at least float32, also under autocast.

    Args:
        features: A [B, m, H, W].
        gather: Logits of the attention maps, B [B, n, H, W].
        distribute: Logits of the attention vectors, V [B, n, H, W].

    Returns:
        Map [B, m, H, W] in the dtype of `features`.
    """
    with autocast_off(features):
        maps = widen(gather).flatten(2).softmax(2)  # [B, n, HW]
        vectors = widen(distribute).flatten(2).softmax(1)  # [B, n, HW]
        descriptors = widen(features).flatten(2) @ maps.transpose(1, 2)  # [B, m, n]
        out = descriptors @ vectors  # [B, m, HW]
    return out.unflatten(2, features.shape[2:]).to(features.dtype)


class DoubleAttention(nn.Module):
    """y = x + N(W Z) with Z as in `double_attention` (section 3.3). No biases.

    The default widths give the parameters that Squeeze Reasoning's Table IV prints for this head.

    Args:
        in_channels: C.
        descriptor_channels: m; None for C / 2.
        num_descriptors: n; None for C / 2.
        norm: N, as in `make_norm`.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is not positive or `norm` unknown.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        descriptor_channels: int | None = None,
        num_descriptors: int | None = None,
        norm: str = "BN",
    ) -> None:
        super().__init__()
        check_positive(in_channels, "in_channels")
        width = in_channels // 2 if descriptor_channels is None else descriptor_channels
        count = in_channels // 2 if num_descriptors is None else num_descriptors
        check_positive(width, "descriptor_channels")
        check_positive(count, "num_descriptors")
        self.in_channels = in_channels
        self.features = kaiming_normal_(nn.Conv2d(in_channels, width, 1, bias=False))
        self.gather = kaiming_normal_(nn.Conv2d(in_channels, count, 1, bias=False))
        self.distribute = kaiming_normal_(nn.Conv2d(in_channels, count, 1, bias=False))
        self.out = kaiming_normal_(nn.Conv2d(width, in_channels, 1, bias=False))
        self.norm = make_norm(norm, in_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Give every position the descriptors it asks for.

        Args:
            x: Map [B, C, H, W].

        Returns:
            Map [B, C, H, W], in the dtype of `x`.

        Raises:
            TypeError: If `x` is not floating point.
            ValueError: If `x` is not [B, C, H, W] with the C of the module.
        """
        check_map(x, "x", channels=self.in_channels)
        received = double_attention(self.features(x), self.gather(x), self.distribute(x))
        return x + self.norm(self.out(received)).to(x.dtype)
