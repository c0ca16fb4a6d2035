"""Content-aware resampling as layers: predicted kernels and the reassembly they drive.

Letters: B batch, C channels, G channels of the guide, H W map, k window, s scale or stride.
"""

from torch import Tensor, nn

from ctxops.checks import check_choice, check_odd, check_positive
from ctxops.init import conv2d
from ctxops.reassembly import IMPLS, normalize_kernels, reassemble_down, reassemble_up


class KernelPredictor(nn.Module):
    """Reassembly kernels from a guide map (K of Eqs. 7 and 11).

    1x1 convolution, `num_blends` times (3x3 convolution + ReLU), then one `kernel_encoder` window
    that predicts k^2 s^2 channels, with the stride of the pooling where there is one; softmax over
    the k^2 taps. The last layer starts near zero, so that all taps start nearly equal.

    Args:
        in_channels: Channels of the guide.
        kernel_size: k, odd.
        scale: s of an up-sampling, else 1.
        stride: Stride of a pooling, else 1.
        reduction_channels: Width after the 1x1 convolution.
        kernel_encoder: Window of the last convolution, odd.
        num_blends: 1 in A²-FPN, 0 in CARAFE.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        kernel_size: int,
        scale: int = 1,
        stride: int = 1,
        reduction_channels: int = 64,
        kernel_encoder: int = 3,
        num_blends: int = 1,
    ) -> None:
        super().__init__()
        check_odd(kernel_size, "kernel_size")
        check_odd(kernel_encoder, "kernel_encoder")
        check_positive(reduction_channels, "reduction_channels")
        self.kernel_size = kernel_size
        self.scale = scale
        self.reduce = conv2d(in_channels, reduction_channels, 1)
        self.blend = nn.Sequential()
        for index in range(num_blends):
            blend = conv2d(reduction_channels, reduction_channels, 3)
            self.blend.add_module(f"conv{index}", blend)
            self.blend.add_module(f"relu{index}", nn.ReLU())
        channels = kernel_size**2 * scale**2
        self.predict = conv2d(reduction_channels, channels, kernel_encoder, stride=stride)
        nn.init.normal_(self.predict.weight, std=0.001)

    def forward(self, guide: Tensor) -> Tensor:
        """Predict and normalise.

        Args:
            guide: Map [B, in_channels, H, W].

        Returns:
            Kernels [B, k^2, s^2, ceil(H / stride), ceil(W / stride)].
        """
        return self.from_reduced(self.reduce(guide))

    def from_reduced(self, reduced: Tensor) -> Tensor:
        """All but the 1x1 convolution.

        Args:
            reduced: What it gives [B, reduction_channels, H, W].

        Returns:
            Kernels as from `forward`.
        """
        logits = self.predict(self.blend(reduced))
        return normalize_kernels(logits, kernel_size=self.kernel_size, scale=self.scale)


class ContentAwareUp(nn.Module):
    """Up-sampling with kernels predicted from a guide (A²-FPN, Eqs. 7 and 8).

    Args:
        predictor: Guide [B, G, H, W] to kernels [B, k^2, s^2, H, W].
        reassembly: Implementation of `reassemble_up`.
    """

    def __init__(self, *, predictor: nn.Module, reassembly: str = "auto") -> None:
        super().__init__()
        check_choice(reassembly, "reassembly", IMPLS)
        self.predictor = predictor
        self.reassembly = reassembly

    def forward(self, x: Tensor, guide: Tensor | None = None) -> Tensor:
        """Up-sample.

        Args:
            x: Map [B, C, H, W].
            guide: Map [B, G, H, W] the kernels are predicted from; None: `x` itself, as in CARAFE.

        Returns:
            Map [B, C, s H, s W].
        """
        return self.with_kernels(x, self.predictor(x if guide is None else guide))

    def with_kernels(self, x: Tensor, kernels: Tensor) -> Tensor:
        """Up-sample with kernels that are there already.

        Args:
            x: Map [B, C, H, W].
            kernels: What the predictor gives [B, k^2, s^2, H, W].

        Returns:
            Map [B, C, s H, s W].
        """
        return reassemble_up(x, kernels, impl=self.reassembly)


class ContentAwarePool(nn.Module):
    """Pooling with kernels predicted from a guide (A²-FPN, Eqs. 11 and 12).

    Args:
        predictor: Guide [B, G, H, W] to kernels [B, k^2, 1, ceil(H / s), ceil(W / s)].
        stride: s.
        reassembly: Implementation of `reassemble_down`.
    """

    def __init__(self, *, predictor: nn.Module, stride: int = 2, reassembly: str = "auto") -> None:
        super().__init__()
        check_choice(reassembly, "reassembly", IMPLS)
        self.predictor = predictor
        self.stride = stride
        self.reassembly = reassembly

    def forward(self, x: Tensor, guide: Tensor | None = None) -> Tensor:
        """Pool.

        Args:
            x: Map [B, C, H, W].
            guide: Map [B, G, H, W] the kernels are predicted from; None: `x` itself.

        Returns:
            Map [B, C, ceil(H / s), ceil(W / s)].
        """
        return self.with_kernels(x, self.predictor(x if guide is None else guide))

    def with_kernels(self, x: Tensor, kernels: Tensor) -> Tensor:
        """Pool with kernels that are there already.

        Args:
            x: Map [B, C, H, W].
            kernels: What the predictor gives [B, k^2, 1, ceil(H / s), ceil(W / s)].

        Returns:
            Map [B, C, ceil(H / s), ceil(W / s)].
        """
        return reassemble_down(x, kernels, stride=self.stride, impl=self.reassembly)
