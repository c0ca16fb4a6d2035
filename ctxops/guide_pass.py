"""What a guided step takes from its guide, without the guide: the float32 path of the CPU.

The guide of a step (see `fusion`) is two maps side by side, the second one bilinearly enlarged to
the size of the first. Two 1x1 convolutions read it, and the means of its pixels under the softmax
of one of them. All of that is linear in the pixels, so that it commutes with enlarging: the second
map is projected first and enlarged afterwards, a few channels instead of D, and its means are taken
with weights that are brought to its own size. Nothing of 2D channels is written, and each map gets
its gradient from one product of matrices. Results differ from the definition by rounding.

Letters: B batch, D channels of each map, H W and P = H W size of the first map, h w and p = h w of
the second, R channels of the projection.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ctxops.products import product


class GuidePass(torch.autograd.Function):
    """(W g, means of g under softmax_P(v g)) for the guide g = [first, enlarged second]."""

    @staticmethod
    def forward(
        ctx: Any, first: Tensor, second: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[B, D, H, W], [B, D, h, w], rows (W, v) [R + 1, 2D], [R + 1] -> [B, R, H, W], [B, 2D]."""
        sizes = first.shape[2:], second.shape[2:]
        halves = [half.contiguous() for half in weight.chunk(2, dim=1)]
        projected = _projected(halves[1], second)
        both = _enlarged(projected, sizes[0]) + _projected(halves[0], first) + bias[:, None, None]
        mask = both[:, -1:].flatten(2).softmax(-1).unflatten(2, sizes[0])  # [B, 1, H, W]
        masks = mask, _gathered(mask, sizes[1])
        ctx.save_for_backward(first, second, *halves, *masks)
        return both[:, :-1], torch.cat(
            [_pooled(x, m) for x, m in zip((first, second), masks, strict=True)], dim=1
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_both: Tensor, grad_means: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of all arguments."""
        first, second, *halves, mask, second_mask = ctx.saved_tensors
        means = grad_means.chunk(2, dim=1)  # 2 x [B, D]
        grad_mask = _dots(first, means[0]) + _enlarged(_dots(second, means[1]), first.shape[2:])
        grad_mask -= (grad_mask * mask).sum((2, 3), keepdim=True)
        grads = torch.cat([grad_both, grad_mask * mask], dim=1)  # of the projection
        second_grads = _gathered(grads, second.shape[2:])
        parts = [
            _half_gradients(first, halves[0], means[0], grads, mask),
            _half_gradients(second, halves[1], means[1], second_grads, second_mask),
        ]
        grad_weight = torch.cat([part[1] for part in parts], dim=1)
        return parts[0][0], parts[1][0], grad_weight, grads.sum((0, 2, 3))


def _half_gradients(
    x: Tensor, weight: Tensor, grad_means: Tensor, grads: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of a map [B, D, H, W] and its half of the weight [R + 1, D]."""
    grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
    for image, features in enumerate(x.flatten(2)):
        rows = torch.cat([grads[image], mask[image]]).flatten(1)  # [R + 2, P]
        columns = torch.cat([weight.t(), grad_means[image, :, None]], dim=1)  # [D, R + 2]
        grad_x[image] = product(columns, rows).view_as(grad_x[image])
        grad_weight += product(rows[:-1], features.t())
    return grad_x, grad_weight


def _projected(weight: Tensor, x: Tensor) -> Tensor:
    """[R + 1, D], [B, D, H, W] -> [B, R + 1, H, W]."""
    maps = torch.stack([product(weight, features) for features in x.flatten(2)])
    return maps.unflatten(2, x.shape[2:])


def _pooled(x: Tensor, mask: Tensor) -> Tensor:
    """Sums of pixels with the weights of a mask, [B, D, H, W], [B, 1, H, W] -> [B, D]."""
    return (x.flatten(2) @ mask.flatten(2).transpose(1, 2)).squeeze(2)


def _dots(x: Tensor, vectors: Tensor) -> Tensor:
    """Inner products of [B, D, H, W] with one vector per image [B, D], [B, 1, H, W]."""
    return (vectors[:, None] @ x.flatten(2)).unflatten(2, x.shape[2:])


def _enlarged(x: Tensor, size: torch.Size) -> Tensor:
    """Bilinear interpolation, pixel edges matched."""
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _gathered(grad: Tensor, size: torch.Size) -> Tensor:
    """The adjoint of `_enlarged`: from the larger size to the smaller one."""
    if grad.shape[2:] == size:
        return grad
    shape = [*grad.shape[:2], *size]
    backward = torch.ops.aten.upsample_bilinear2d_backward
    out: Tensor = backward(grad.contiguous(), list(grad.shape[2:]), shape, False)
    return out
