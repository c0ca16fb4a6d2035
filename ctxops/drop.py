"""Structured dropout: whole residual branches (stochastic depth) and square blocks of maps."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

from ctxops.checks import check_map, check_odd, check_probability
from ctxops.precision import widened_dtype


class DropPath(nn.Module):
    """Stochastic depth: in training, drop the whole residual branch of an image at random.

    Args:
        drop_path_rate: Probability in [0, 1) of dropping; what is kept is scaled by its inverse.

    Raises:
        ValueError: If the rate is no probability.
    """

    def __init__(self, *, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        check_probability(drop_path_rate, "drop_path_rate")
        self.drop_path_rate = drop_path_rate

    def forward(self, x: Tensor) -> Tensor:
        """Drop images of the branch.

        Args:
            x: Residual branch [B, ...].

        Returns:
            The same shape; `x` itself in evaluation mode or at rate 0.
        """
        return stochastic_depth(x, self.drop_path_rate, "row", self.training)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"drop_path_rate={self.drop_path_rate}"


class DropBlock(nn.Module):
    """DropBlock: in training, set square blocks of a map to zero, each channel on its own.

    Block centres are drawn with gamma = p / b^2 * HW / ((H - b + 1)(W - b + 1)); the rest is scaled
    by numel / kept. Blocks overlap, so that slightly less than p is dropped.

    Deviation: torchvision's `drop_block2d` raises on maps smaller than the block where the smaller
    side is even; here the block shrinks to the largest odd size that fits.

    Args:
        block_size: b, odd.
        drop_prob: p in [0, 1).
        ramp: Training steps over which p grows linearly from 0; 0 for none.

    Raises:
        TypeError: If `block_size` is not an integer.
        ValueError: If `block_size` is even, `drop_prob` no probability or `ramp` negative.
    """

    steps: Tensor

    def __init__(self, *, block_size: int, drop_prob: float, ramp: int = 0) -> None:
        super().__init__()
        check_odd(block_size, "block_size")
        check_probability(drop_prob, "drop_prob")
        if ramp < 0:
            raise ValueError(f"ramp: expected 0 or a number of steps, got {ramp}; use 0 for none")
        self.block_size = block_size
        self.drop_prob = drop_prob
        self.ramp = ramp
        if ramp:
            # A tensor, so that growing it costs no synchronisation and a resumed run goes on.
            self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Drop blocks.

        Args:
            x: Map [B, C, H, W].

        Returns:
            Map of the same shape; `x` itself in evaluation mode or with `drop_prob` 0.

        Raises:
            TypeError: If `x` is not floating point.
            ValueError: If `x` has not four axes.
        """
        check_map(x, "x")
        if not self.training or self.drop_prob == 0:
            return x
        size = min(self.block_size, (min(x.shape[2:]) - 1) // 2 * 2 + 1)
        keep = self._kept(x, size)
        scale = keep.numel() / keep.sum().clamp(min=1)
        return x * (keep * scale).to(x.dtype)

    def _kept(self, x: Tensor, size: int) -> Tensor:
        """Mask [B, C, H, W] of ones outside the blocks."""
        height, width = x.shape[2:]
        centres = height - size + 1, width - size + 1
        gamma = self._probability(x) * (height * width / (size**2 * centres[0] * centres[1]))
        noise = torch.rand(*x.shape[:2], *centres, device=x.device) < gamma
        mask = F.pad(noise.to(widened_dtype(x.dtype)), [size // 2] * 4)
        return 1 - F.max_pool2d(mask, size, stride=1, padding=size // 2)

    def _probability(self, x: Tensor) -> float | Tensor:
        if not self.ramp:
            return self.drop_prob
        self.steps += 1
        return self.drop_prob * (self.steps / self.ramp).clamp(max=1)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"block_size={self.block_size}, drop_prob={self.drop_prob}, ramp={self.ramp}"
