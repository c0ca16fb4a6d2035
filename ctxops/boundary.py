"""Directions to the interior of an object, and refining logits along them (UN-EPT, Sec. 3.2).

A direction is one of 8 bins of the angle atan2(dy, dx) in degrees, y down. Bin i is centred on
-180 + 45 i and holds (centre - 22.5, centre + 22.5]; bin 0 wraps around:

    1 up-left    2 up    3 up-right
    0 left               4 right
    7 down-left  6 down  5 down-right

A boundary pixel takes the logits of its neighbour in its direction; diagonals move on both axes.

Letters: B batch, K classes, H W map at full resolution.
"""

from typing import Any

import torch
from torch import Tensor

from ctxops.checks import check_choice, check_map, check_positive

NUM_DIRECTIONS = 8
# (dh, dw) of every bin.
VECTORS = ((0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1))
MASK_RULES = ("probability", "logit")
FLIPS = ("horizontal", "vertical")


def direction_vectors(device: torch.device | str | None = None) -> Tensor:
    """The step of every bin.

    Args:
        device: Of the result.

    Returns:
        int64 [8, 2] as (dh, dw).
    """
    return torch.tensor(VECTORS, device=device)


def bin_of_angle(angle: Tensor) -> Tensor:
    """Direction bin of an angle.

    Args:
        angle: Degrees in [-180, 180], atan2(dy, dx) with y down; any shape.

    Returns:
        int64 bins 0..7, same shape.
    """
    return ((angle + 157.5) / 45).ceil().long() % NUM_DIRECTIONS


def flip_bins(bins: Tensor, axis: str, *, ignore_index: int = 255) -> Tensor:
    """What bins become when the image is mirrored; moving the pixels is up to the caller.

    Args:
        bins: Integers 0..7 or `ignore_index`, any shape.
        axis: `horizontal` swaps left and right, `vertical` up and down.
        ignore_index: Stays as it is.

    Returns:
        Same shape and dtype.

    Raises:
        ValueError: If `axis` is unknown.
    """
    check_choice(axis, "axis", FLIPS)
    start = 4 if axis == "horizontal" else 0
    flipped = (start - bins.long()) % NUM_DIRECTIONS
    return torch.where(bins == ignore_index, bins, flipped.to(bins.dtype))


def boundary_mask(logits: Tensor, *, rule: str = "probability") -> Tensor:
    """Where the boundary head says boundary.

    Args:
        logits: [B, 1, H, W], of boundary; or [B, 2, H, W], of interior and boundary.
        rule: `probability` (sigmoid or softmax) above 0.5; or `logit`, the raw boundary logit above
            0.5, as the released code refines.

    Returns:
        bool [B, H, W].

    Raises:
        TypeError: If `logits` is not floating point.
        ValueError: If `logits` has neither one nor two channels, or `rule` is unknown.
    """
    check_choice(rule, "rule", MASK_RULES)
    check_map(logits, "logits")
    if logits.shape[1] not in (1, 2):
        raise ValueError(
            f"logits: expected 1 or 2 channels of boundary logits, got {logits.shape[1]} (shape "
            f"{tuple(logits.shape)}); pass the output of the boundary head"
        )
    boundary = logits[:, -1]
    if rule == "logit":
        return boundary > 0.5
    # sigmoid(x) > 0.5 where x > 0, softmax(a, b) > 0.5 where b > a: no rounding.
    return boundary > (0 if logits.shape[1] == 1 else logits[:, 0])


def refinement_offsets(direction: Tensor, mask: Tensor, *, scale: int = 1) -> Tensor:
    """The step of every pixel: that of its likeliest direction on boundary pixels, else none.

    Args:
        direction: Direction logits [B, 8, H, W].
        mask: bool [B, H, W], see `boundary_mask`.
        scale: Pixels per step and axis.

    Returns:
        int64 [B, 2, H, W] as (dh, dw).

    Raises:
        TypeError: If `direction` is not floating point, `mask` not bool, `scale` not an integer.
        ValueError: If the shapes do not fit together, or `scale` is below 1.
    """
    check_positive(scale, "scale")
    check_map(direction, "direction", channels=NUM_DIRECTIONS)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected bool, got {mask.dtype}; use boundary_mask(logits)")
    if mask.shape != direction[:, 0].shape:
        raise ValueError(
            f"mask: expected {tuple(direction[:, 0].shape)} [B, H, W] for these directions, got "
            f"{tuple(mask.shape)}; resize both heads to the size of the labels"
        )
    steps = scale * direction_vectors(direction.device)[direction.argmax(1)]  # [B, H, W, 2]
    return (steps * mask[..., None]).permute(0, 3, 1, 2)


def shift_map(x: Tensor, offsets: Tensor) -> Tensor:
    """Every pixel takes the value `offsets` away, or that of the nearest pixel of the map.

    out(y, x) = in(clamp(y + dh), clamp(x + dw)). Gradients reach `x` only.

    Args:
        x: Map [B, K, H, W].
        offsets: Integers [B, 2, H, W] as (dh, dw).

    Returns:
        [B, K, H, W], exact copies.

    Raises:
        TypeError: If `x` is not floating point, or `offsets` not integer.
        ValueError: If the shapes do not fit together.
    """
    check_map(x, "x")
    batch, channels, height, width = x.shape
    if offsets.is_floating_point() or offsets.dtype == torch.bool:
        raise TypeError(f"offsets: expected integers, got {offsets.dtype}; see refinement_offsets")
    if tuple(offsets.shape) != (batch, 2, height, width):
        raise ValueError(
            f"offsets: expected {(batch, 2, height, width)} for a map {tuple(x.shape)}, got "
            f"{tuple(offsets.shape)}; shift at the size the offsets were made for"
        )
    rows = torch.arange(height, device=x.device)[:, None] + offsets[:, 0]
    columns = torch.arange(width, device=x.device) + offsets[:, 1]
    index = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)  # [B, H, W]
    index = index.flatten(1)[:, None].expand(-1, channels, -1)  # [B, K, H W]
    flat = x.flatten(2)
    gathered = (
        flat.gather(2, index) if torch.compiler.is_compiling() else _Gather.apply(flat, index)
    )
    return gathered.unflatten(2, (height, width))


class _Gather(torch.autograd.Function):
    """`gather` along the last axis; PyTorch's keeps the map for its backward pass, for its size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        """Map [B, K, N] and indices [B, K, N] -> [B, K, N]."""
        ctx.save_for_backward(index)
        return x.gather(2, index)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None]:
        """Gradient of x; differentiable in `grad_out`."""
        (index,) = ctx.saved_tensors
        return torch.zeros_like(grad_out).scatter_add(2, index, grad_out), None


def refine_logits(
    logits: Tensor,
    boundary: Tensor,
    direction: Tensor,
    *,
    mask_rule: str = "probability",
    offset_scale: int = 1,
) -> Tensor:
    """Boundary pixels take the class logits of their neighbour towards the interior (Sec. 3.2).

    Deviation: the paper samples with bilinear `grid_sample`; at whole pixels this is a gather,
    which is exact.

    Args:
        logits: Class logits [B, K, H, W].
        boundary: Boundary logits [B, 1 or 2, H, W].
        direction: Direction logits [B, 8, H, W].
        mask_rule: As `rule` in `boundary_mask`.
        offset_scale: Pixels per step and axis.

    Returns:
        [B, K, H, W]; the gradient reaches `logits` only.

    Raises:
        TypeError: If an argument is not floating point.
        ValueError: If the shapes do not fit together, or `mask_rule` is unknown.
    """
    mask = boundary_mask(boundary, rule=mask_rule)
    return shift_map(logits, refinement_offsets(direction, mask, scale=offset_scale))
