"""Attention augmented convolution, AA ("Attention Augmented Convolutional Networks").

Some output channels of a convolution come from self-attention over the whole map instead, with
relative positions along both axes.

Letters: B batch, C channels, H W map, N = H W, n heads, d width of a head's queries, v of its
values, M largest distance with an embedding of its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxops.attention import WIDTH_MULTIPLE
from ctxops.checks import check_divides, check_map, check_odd, check_positive
from ctxops.init import fan_in_uniform_
from ctxops.precision import autocast_off, widen


def relative_logits(query: Tensor, embedding: Tensor, length: int, *, axis: int) -> Tensor:
    """Products of every query with the embeddings of all offsets along one axis (Eq. 3).

    Args:
        query: [B, n, H, W, d].
        embedding: r [2 M + 1, d] for the offsets -M .. M; farther ones take those of the ends.
        length: Size of the axis, H or W.
        axis: The axis in `query`, 2 or 3.

    Returns:
        [B, n, H, W, length]; entry k belongs to the key at coordinate k of the axis.
    """
    far = embedding.shape[0] // 2
    positions = torch.arange(length, device=query.device)
    offsets = (positions[None, :] - positions[:, None]).clamp(-far, far) + far
    vectors = embedding[offsets]  # [query coordinate, key coordinate, d]
    equation = "bnhwd,hkd->bnhwk" if axis == 2 else "bnhwd,wkd->bnhwk"
    return torch.einsum(equation, query, vectors)


def augmented_attention(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor
) -> Tensor:
    """Self-attention with logits q . (k + r_row + r_column) / sqrt(d) (Eqs. 2, 3).

    The logits of positions ride in extra channels: a query carries its products with the offsets to
    every row and column, a key marks its own row and column. So no N x N matrix is kept where
    PyTorch has a fused kernel. In at least float32, also under autocast.

    Args:
        query: [B, n, d, H, W].
        key: [B, n, d, H, W].
        value: [B, n, v, H, W].
        rows: r of the vertical offsets [2 M + 1, d].
        columns: r of the horizontal offsets [2 M + 1, d].

    Returns:
        [B, n, v, H, W] in the dtype of `value`.
    """
    height, width = query.shape[-2:]
    with autocast_off(query):
        q = widen(query).movedim(2, -1)  # [B, n, H, W, d]
        k, v = (widen(x).flatten(3).transpose(2, 3) for x in (key, value))  # [B, n, N, d or v]
        vertical = relative_logits(q, rows.to(q.dtype), height, axis=2)
        horizontal = relative_logits(q, columns.to(q.dtype), width, axis=3)
        queries = torch.cat([q, vertical, horizontal], -1).flatten(2, 3)  # [B, n, N, d + H + W]
        row = torch.eye(height, dtype=q.dtype, device=q.device).repeat_interleave(width, 0)
        column = torch.eye(width, dtype=q.dtype, device=q.device).repeat(height, 1)
        marks = torch.cat([row, column], 1).expand(*k.shape[:2], -1, -1)  # [B, n, N, H + W]
        keys = torch.cat([k, marks], -1)
        # Fused kernels need one width for all on CPUs, and a round one on accelerators.
        needed = max(keys.shape[-1], v.shape[-1])
        total = needed + -needed % WIDTH_MULTIPLE
        padded = [F.pad(x, (0, total - x.shape[-1])) for x in (queries, keys, v)]
        out = F.scaled_dot_product_attention(
            padded[0], padded[1], padded[2], scale=q.shape[-1] ** -0.5
        )
    out = out[..., : v.shape[-1]].transpose(2, 3).unflatten(3, (height, width))
    return out.to(value.dtype)


class AugmentedConv(nn.Module):
    """[conv(x), W_o attention(x)]: C' output channels, dv of them from attention (Eq. 4).

    Strided, the attention sees the map averaged over 3x3 windows, so that sizes are rounded up as
    those of the convolution.

    Deviation: offsets beyond M share the embedding of M; the paper's maps have one size.

    Args:
        in_channels: C.
        out_channels: C'.
        key_channels: n d, the width of all queries.
        value_channels: n v, less than C'.
        num_heads: n.
        kernel_size: Odd window of the convolution.
        stride: Of convolution and attention.
        dilation: Of the convolution.
        max_distance: M.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is not positive, the heads do not divide a width, or no channel is
            left to the convolution.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        key_channels: int,
        value_channels: int,
        num_heads: int = 8,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        max_distance: int = 64,
    ) -> None:
        super().__init__()
        check_odd(kernel_size, "kernel_size")
        sizes = {"in_channels": in_channels, "num_heads": num_heads, "max_distance": max_distance}
        for name, size in sizes.items():
            check_positive(size, name)
        check_divides(num_heads, key_channels, "num_heads and key_channels")
        check_divides(num_heads, value_channels, "num_heads and value_channels")
        if not 0 < value_channels < out_channels:
            raise ValueError(
                f"value_channels: expected 1 .. {out_channels - 1} for {out_channels} output "
                f"channels, got {value_channels}; leave some to the convolution"
            )
        self.in_channels = in_channels
        self.num_heads = num_heads
        self.widths = (key_channels, key_channels, value_channels)
        self.stride = stride
        padding = dilation * (kernel_size // 2)
        plain = out_channels - value_channels
        self.conv = fan_in_uniform_(
            nn.Conv2d(
                in_channels, plain, kernel_size, stride, padding, dilation=dilation, bias=False
            )
        )
        self.qkv = fan_in_uniform_(nn.Conv2d(in_channels, sum(self.widths), 1, bias=False))
        self.out = fan_in_uniform_(nn.Conv2d(value_channels, value_channels, 1, bias=False))
        head = key_channels // num_heads
        self.rows = nn.Parameter(torch.randn(2 * max_distance + 1, head) * head**-0.5)
        self.columns = nn.Parameter(torch.randn(2 * max_distance + 1, head) * head**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and attend.

        Args:
            x: Map [B, C, H, W].

        Returns:
            Map [B, C', ceil(H / stride), ceil(W / stride)]; attention has the last channels.

        Raises:
            TypeError: If `x` is not floating point.
            ValueError: If `x` is not [B, C, H, W] with the C of the module.
        """
        check_map(x, "x", channels=self.in_channels)
        seen = x
        if self.stride > 1:
            seen = F.avg_pool2d(x, 3, self.stride, 1, count_include_pad=False)
        parts = self.qkv(seen).split(self.widths, 1)
        query, key, value = (part.unflatten(1, (self.num_heads, -1)) for part in parts)
        attended = augmented_attention(query, key, value, self.rows, self.columns)
        return torch.cat([self.conv(x), self.out(attended.flatten(1, 2))], 1)
