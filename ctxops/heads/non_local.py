"""Non-local block, NL ("Non-local Neural Networks"): every position attends to every position.

Letters: B batch, C channels, H W map, N keys, d width of queries and keys, v width of the values.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ctxops.checks import check_divides, check_map, check_positive
from ctxops.init import fan_in_uniform_
from ctxops.norm import make_norm
from ctxops.precision import autocast_off, widen


def attend_positions(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """For every position of a map the mean of values, weighted by softmax(scale * q . k).

    In at least float32, also under autocast. No HW x N matrix is kept where PyTorch has a fused
    attention kernel, which on CPUs needs d = v.

    Args:
        query: Map [B, d, H, W].
        key: [B, d, N].
        value: [B, v, N].
        scale: Factor in front of the products.

    Returns:
        Map [B, v, H, W] in the dtype of `value`.
    """
    with autocast_off(query):
        out = F.scaled_dot_product_attention(
            _one_head(query.flatten(2)), _one_head(key), _one_head(value), scale=scale
        )  # [B, 1, HW, v]
    return out[:, 0].transpose(1, 2).unflatten(2, query.shape[2:]).to(value.dtype)


def _one_head(x: Tensor) -> Tensor:
    """[B, d, N] -> [B, 1, N, d], packed: fused kernels refuse strided vectors."""
    return widen(x).transpose(1, 2)[:, None].contiguous()


class NonLocal(nn.Module):
    """y = x + N(W_z softmax(theta(x)^T phi(x)) g(x)), embedded Gaussian (Eqs. 3, 6).

    No biases. Starts as the identity: the scale of N is 0 (section 4.1), or W_z without a norm.

    Deviation: the products are divided by sqrt(d), which Eq. 3 does not show and the authors' code
    does; `scaled=False` is the equation.

    Args:
        in_channels: C.
        reduction: C / d, a divisor of C.
        norm: N, as in `make_norm`.
        scaled: Whether the products are divided by sqrt(d).

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is not positive, `reduction` no divisor of C, or `norm` unknown.
    """

    def __init__(
        self, *, in_channels: int, reduction: int = 2, norm: str = "BN", scaled: bool = True
    ) -> None:
        super().__init__()
        check_positive(in_channels, "in_channels")
        check_positive(reduction, "reduction")
        check_divides(reduction, in_channels, "reduction and in_channels")
        width = in_channels // reduction
        self.in_channels = in_channels
        self.scale = width**-0.5 if scaled else 1.0
        self.query = fan_in_uniform_(nn.Conv2d(in_channels, width, 1, bias=False))
        self.key = fan_in_uniform_(nn.Conv2d(in_channels, width, 1, bias=False))
        self.value = fan_in_uniform_(nn.Conv2d(in_channels, width, 1, bias=False))
        self.out = fan_in_uniform_(nn.Conv2d(width, in_channels, 1, bias=False))
        self.norm = make_norm(norm, in_channels)
        nn.init.zeros_((self.norm if norm else self.out).get_parameter("weight"))

    def forward(self, x: Tensor) -> Tensor:
        """Let every position see all others.

        Args:
            x: Map [B, C, H, W].

        Returns:
            Map [B, C, H, W], in the dtype of `x`.

        Raises:
            TypeError: If `x` is not floating point.
            ValueError: If `x` is not [B, C, H, W] with the C of the module.
        """
        check_map(x, "x", channels=self.in_channels)
        key, value = self.key(x).flatten(2), self.value(x).flatten(2)
        received = attend_positions(self.query(x), key, value, scale=self.scale)
        return x + self.norm(self.out(received)).to(x.dtype)
