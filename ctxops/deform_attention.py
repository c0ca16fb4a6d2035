"""Multi-scale deformable attention (UN-EPT, Eq. 4-6): every query averages a few sampled points.

Locations are (x, y) in [0, 1] over a map: x W_l - 0.5 is the column in pixels, so that 0 and 1 are
the outer edges of the first and last pixel (`align_corners` False). Samples are bilinear, with
zeros outside the map.

The function has these implementations with the same numbers:

- `grid_sample`: level by level with `F.grid_sample`, under autograd. The reference, traceable.
- `chunked`: sums of table rows (see `sampled_sum`), with a backward pass of its own that keeps
  nothing but the arguments. CPU only, no second derivatives.
- `triton`: fused kernels for CUDA devices (see `kernels`), without temporary samples, and without
  atomics: two runs give the same bits. No second derivatives.
- `auto`: `triton` on CUDA devices where Triton is installed; `chunked` on a CPU, unless there are
  too few points to pay for it; else `grid_sample`.

Inside a torch.compile of the caller `grid_sample` is traced in place of `chunked`, and `triton` is
one operator; in torch.export it is always `grid_sample`.

Letters: B batch, Q queries, L levels, S tokens of all levels, M heads, D width of a head,
N points per head and level, d = M D.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxops.checks import check_choice, check_divides, check_positive, check_tokens
from ctxops.init import xavier_
from ctxops.kernels.probe import deformable_fits, runs_triton
from ctxops.position import check_grid
from ctxops.precision import autocast_off, widen, widened_dtype
from ctxops.sampled_sum import SampledSum

IMPLS = ("auto", "chunked", "grid_sample", "triton")
# Points per image and head from which on `chunked` is the faster one.
MIN_CHUNKED_POINTS = 2**12


def deformable_attention(
    value: Tensor,
    level_shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    *,
    impl: str = "auto",
) -> Tensor:
    """Weighted sums of bilinear samples from the maps of all levels (UN-EPT, Eq. 6).

    out[q, m] = sum over levels l and points n of weights[q, m, l, n] * value_l[m](locations[q, m,
    l, n]).

    Args:
        value: [B, S, M, D], the levels after each other, each row-major.
        level_shapes: L sizes (H_l, W_l) with S = sum H_l W_l.
        locations: [B, Q, M, L, N, 2] as (x, y), see the head of this file; may lie outside.
        weights: [B, Q, M, L, N].
        impl: `grid_sample`, `chunked`, `triton` or `auto`, see the head of this file.

    Returns:
        [B, Q, M D] in the dtype of `value`; computed in at least float32.

    Raises:
        TypeError: If a tensor is not floating point or a size is not an integer.
        ValueError: If the shapes do not fit together, or `impl` is unknown or cannot run there.
    """
    check_choice(impl, "impl", IMPLS)
    _check_tensors(value, level_shapes, locations, weights)
    fits = deformable_fits(value, weights)
    if not torch.compiler.is_exporting() and runs_triton(impl, value.device, fits=fits):
        from ctxops.kernels.deformable import deformable_attention_triton

        return deformable_attention_triton(value, level_shapes, locations, weights)
    if _choose(impl, value, weights) == "grid_sample":
        return _grid_sample(value, level_shapes, locations, weights)
    return SampledSum.apply(value, tuple(level_shapes), locations, weights).flatten(2)


def _choose(impl: str, value: Tensor, weights: Tensor) -> str:
    """The implementation to run."""
    on_cpu = value.device.type == "cpu"
    if impl == "chunked" and not on_cpu:
        raise ValueError(
            f"impl: 'chunked' runs on a CPU, got tensors on {value.device}; use 'auto'"
        )
    if torch.compiler.is_compiling():
        return "grid_sample"
    if impl != "auto":
        return impl
    many = weights[0, :, 0].numel() >= MIN_CHUNKED_POINTS
    return "chunked" if on_cpu and many else "grid_sample"


def _check_tensors(
    value: Tensor, level_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> None:
    """Refuse tensors that do not fit together."""
    for name, x in (("value", value), ("locations", locations), ("weights", weights)):
        if not x.is_floating_point():
            raise TypeError(f"{name}: expected floating point, got {x.dtype}; call .float() first")
    if value.dim() != 4 or value.numel() == 0:
        raise ValueError(
            f"value: expected non-empty [B, S, M, D], got shape {tuple(value.shape)}; "
            "tokens become heads by value.unflatten(2, (num_heads, -1))"
        )
    check_level_shapes(level_shapes, value.shape[1])
    batch, _, heads, _ = value.shape
    expected = f"[{batch}, Q, {heads}, {len(level_shapes)}, N"
    if weights.dim() != 5 or (
        (weights.shape[0], *weights.shape[2:4]) != (batch, heads, len(level_shapes))
    ):
        raise ValueError(
            f"weights: expected {expected}] for this value and these levels, got "
            f"{tuple(weights.shape)}; one weight per image, query, head, level and point"
        )
    if tuple(locations.shape) != (*weights.shape, 2):
        raise ValueError(
            f"locations: expected (x, y) for every weight, {(*weights.shape, 2)}, got "
            f"{tuple(locations.shape)}; expand what is shared between images or heads"
        )


def check_level_shapes(level_shapes: Sequence[tuple[int, int]], num_tokens: int) -> None:
    """Refuse sizes of levels that do not add up to the number of tokens.

    Args:
        level_shapes: L sizes (H_l, W_l).
        num_tokens: S.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If there is no level, a size is not positive, or S is not sum H_l W_l.
    """
    for shape in level_shapes:
        check_grid(shape, "level_shapes")
    if sum(height * width for height, width in level_shapes) != num_tokens:
        raise ValueError(
            f"level_shapes: expected sizes (H, W) of {num_tokens} tokens together, got "
            f"{list(level_shapes)}; concatenate the levels in this order"
        )


def _grid_sample(
    value: Tensor, level_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """The reference, level by level."""
    batch, _, heads, width = value.shape
    queries = weights.shape[1]
    dtype = torch.promote_types(value.dtype, locations.dtype)
    dtype = widened_dtype(torch.promote_types(dtype, weights.dtype))
    out = torch.zeros((), dtype=dtype, device=value.device)
    start = 0
    with autocast_off(value):
        for level, (rows, columns) in enumerate(level_shapes):
            maps = value[:, start : start + rows * columns].to(dtype)  # [B, H W, M, D]
            maps = maps.permute(0, 2, 3, 1).reshape(batch * heads, width, rows, columns)
            grid = 2 * locations[:, :, :, level].to(dtype).transpose(1, 2).flatten(0, 1) - 1
            samples = F.grid_sample(
                maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False
            )  # [B M, D, Q, N]
            share = weights[:, :, :, level].to(dtype).transpose(1, 2).flatten(0, 1)  # [B M, Q, N]
            out = out + (samples * share[:, None]).sum(-1)  # [B M, D, Q]
            start += rows * columns
    return out.view(batch, heads * width, queries).transpose(1, 2).to(value.dtype)


class DeformableAttention(nn.Module):
    """Multi-head deformable attention over several maps (UN-EPT, Sec. 3.1, Eq. 4-6).

    A query predicts, per head, level and point, an offset from its reference point in pixels of
    that level, and a weight; the weights of a head are a softmax over all its L N points.

    Deviation: Eq. 3-4 write the predictions as two factors of rank at most D. As in the released
    code they are one full-rank layer, which is what the paper's operation count belongs to.
    Eq. 2 and 6 print the softmax around the sum; it is taken over the weights.

    Args:
        embed_dim: d.
        num_heads: M.
        num_levels: L.
        num_points: N.
        impl: As in `deformable_attention`.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is not positive, M does not divide d, or `impl` is unknown.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_positive(embed_dim, "embed_dim")
        check_positive(num_heads, "num_heads")
        check_positive(num_levels, "num_levels")
        check_positive(num_points, "num_points")
        check_divides(num_heads, embed_dim, "num_heads and embed_dim")
        check_choice(impl, "impl", IMPLS)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        self.impl = impl
        predictions = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(embed_dim, predictions * 2)
        self.attention_weights = nn.Linear(embed_dim, predictions)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Head m looks in direction m of M, its point n at n pixels, on all levels; equal weights.

        Offsets (n = 1..N): n u_m, u_m = (cos t, sin t) / max(|cos t|, |sin t|), t = 2 pi m / M.
        """
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        distance = torch.arange(1, self.num_points + 1)
        offsets = direction[:, None, None] * distance[:, None]  # [M, 1, N, 2]
        with torch.no_grad():
            bias = self.sampling_offsets.bias.view(self.num_heads, self.num_levels, -1, 2)
            bias.copy_(offsets.expand_as(bias))
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        xavier_(self.value_proj)
        xavier_(self.output_proj)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        level_shapes: Sequence[tuple[int, int]],
    ) -> Tensor:
        """Attend from every query to points near its reference point.

        Args:
            query: [B, Q, d].
            reference_points: (x, y) in [0, 1] per level, [B, Q, L, 2] or [1, Q, L, 2].
            value: Tokens [B, S, d], the levels after each other.
            level_shapes: L sizes (H_l, W_l).

        Returns:
            [B, Q, d]. Softmax, locations and sampling are in at least float32.

        Raises:
            TypeError: If a tensor is not floating point.
            ValueError: If the shapes do not fit together.
        """
        check_tokens(query, "query", channels=self.embed_dim)
        check_tokens(value, "value", channels=self.embed_dim)
        self._check(query, reference_points, level_shapes)
        heads = (self.num_heads, self.num_levels, self.num_points)
        offsets = widen(self.sampling_offsets(query)).unflatten(2, (*heads, 2))
        logits = widen(self.attention_weights(query)).unflatten(2, (self.num_heads, -1))
        weights = logits.softmax(-1).unflatten(3, heads[1:])  # [B, Q, M, L, N]
        sizes = _sizes(level_shapes, offsets)[:, None]  # [L, 1, 2]
        locations = reference_points[:, :, None, :, None] + offsets / sizes
        values = self.value_proj(value).unflatten(2, (self.num_heads, -1))  # [B, S, M, D]
        out = deformable_attention(values, level_shapes, locations, weights, impl=self.impl)
        return self.output_proj(out)

    def _check(
        self, query: Tensor, reference_points: Tensor, level_shapes: Sequence[tuple[int, int]]
    ) -> None:
        if len(level_shapes) != self.num_levels:
            raise ValueError(
                f"level_shapes: expected {self.num_levels} levels, got {len(level_shapes)}; "
                "pass one size (H, W) per level the module was built for"
            )
        batch, queries, _ = query.shape
        if reference_points.dim() != 4 or (
            tuple(reference_points.shape[1:]) != (queries, self.num_levels, 2)
            or reference_points.shape[0] not in (1, batch)
        ):
            raise ValueError(
                f"reference_points: expected [{batch} or 1, {queries}, {self.num_levels}, 2], got "
                f"{tuple(reference_points.shape)}; use cell_centres(grid)[None, :, None]"
                ".expand(-1, -1, num_levels, -1)"
            )

    def extra_repr(self) -> str:
        """What `print` shows."""
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, "
            f"num_levels={self.num_levels}, num_points={self.num_points}, impl={self.impl!r}"
        )


def _sizes(level_shapes: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """[L, 2] of (W_l, H_l), filled on the device: a copy from the host cannot be captured."""
    sides = [
        like.new_full((1,), side) for height, width in level_shapes for side in (width, height)
    ]
    return torch.cat(sides).view(-1, 2)
