"""The pairs for outlines: content-aware up-sampling, and UN-EPT's spatial branch and refinement.

Letters: B batch, C channels, H W image, K classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.gym_parts.images import Batch
from benchmarks.gym_parts.parts import Network, On, Residual, Stem, count_parameters, task_loss
from ctxops.boundary import NUM_DIRECTIONS, boundary_mask, refine_logits
from ctxops.channel_attention import ChannelAttention
from ctxops.fusion import GuidedTopDown, SumFusion
from ctxops.losses import boundary_cross_entropy, direction_cross_entropy
from ctxops.norm import ConvNorm
from ctxops.resampling import ContentAwareUp, KernelPredictor
from ctxops.resize import resize_bilinear
from ctxops.unept import SpatialBranch
from segtrain.data.boundary import BoundaryLabels

NARROW = 24
KERNEL, REDUCED = 5, 16
# The paper's weights of refined logits, boundary and direction (UN-EPT, Sec. 4.1).
LAMBDAS = (1.5, 3.0, 0.7)
# The paper's band is 5 pixels of crops of 480; these objects are 40 pixels wide.
BAND = 3


def _predictor(*, guide: int, blends: int) -> KernelPredictor:
    return KernelPredictor(
        in_channels=guide,
        kernel_size=KERNEL,
        scale=2,
        reduction_channels=REDUCED,
        num_blends=blends,
    )


def _carafe_up() -> nn.Module:
    return ContentAwareUp(predictor=_predictor(guide=NARROW, blends=0))


def _bilinear_up(*, behind: bool) -> nn.Module:
    filler = Residual(channels=NARROW, parameters=count_parameters(_carafe_up()), window=3)
    up = nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=False)
    return nn.Sequential(up, filler) if behind else nn.Sequential(filler, up)


def carafe(num_classes: int) -> nn.Module:
    """Stride 8 to stride 2 in two content-aware steps."""
    stem = Stem((8,), width=NARROW)
    body = On(nn.Sequential(_carafe_up(), _carafe_up()), 0)
    return Network(stem=stem, body=body, num_classes=num_classes, width=NARROW)


def carafe_twin(num_classes: int) -> nn.Module:
    """Two bilinear steps; convolutions where CARAFE predicts its kernels, on the coarse map."""
    return _bilinear(num_classes, behind=False)


def carafe_twin_behind(num_classes: int) -> nn.Module:
    """Two bilinear steps; the convolutions on the enlarged maps, at four times the cost."""
    return _bilinear(num_classes, behind=True)


def _bilinear(num_classes: int, *, behind: bool) -> nn.Module:
    stem = Stem((8,), width=NARROW)
    body = On(nn.Sequential(_bilinear_up(behind=behind), _bilinear_up(behind=behind)), 0)
    return Network(stem=stem, body=body, num_classes=num_classes, width=NARROW)


class TopDown(nn.Module):
    """Steps from coarse to fine.

    Args:
        steps: Called with (coarse, fine), coarse to fine.
        after: One module on the result of each step.
    """

    def __init__(self, steps: Sequence[nn.Module], after: Sequence[nn.Module]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)
        self.after = nn.ModuleList(after)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps, fine to coarse -> the finest one."""
        x = maps[-1]
        for step, after, fine in zip(self.steps, self.after, maps[-2::-1], strict=True):
            x = after(step(x, fine))
        return x


def _guided_step() -> nn.Module:
    attention = ChannelAttention(
        in_channels=2 * NARROW, hidden_channels=NARROW // 2, gate_scale=2.0
    )
    up = ContentAwareUp(predictor=_predictor(guide=2 * NARROW, blends=1))
    return GuidedTopDown(resample=up, attention=attention)


def guided(num_classes: int) -> nn.Module:
    """Strides 8, 4, 2 merged by guided content-aware up-sampling."""
    stem = Stem((2, 4, 8), width=NARROW)
    body = TopDown([_guided_step(), _guided_step()], [nn.Identity(), nn.Identity()])
    return Network(stem=stem, body=body, num_classes=num_classes, width=NARROW)


def guided_twin(num_classes: int) -> nn.Module:
    """The same merged by bilinear sums, each with a convolution behind it."""
    stem = Stem((2, 4, 8), width=NARROW)
    missing = count_parameters(_guided_step())
    steps = [
        SumFusion(resample=nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=False))
        for _ in range(2)
    ]
    fillers = [Residual(channels=NARROW, parameters=missing, window=3) for _ in range(2)]
    body = TopDown(steps, fillers)
    return Network(stem=stem, body=body, num_classes=num_classes, width=NARROW)


class Refined(nn.Module):
    """Context from a stem of stride 8, UN-EPT's spatial branch with its heads, refinement or none.

    Cell i of the branch looks at pixel 8 i. Matching pixel edges puts it 3.5 pixels beside, the
    same everywhere, which convolutions can learn; matching corners, as the released code does,
    would put it 0 to 7 pixels beside, from the left to the right of these images.

    Args:
        num_classes: K.
        refine: Whether logits are refined, in the loss and in prediction; the weights are the same.
    """

    def __init__(self, *, num_classes: int, refine: bool) -> None:
        super().__init__()
        self.refine = refine
        self.stem = Stem((8,), width=NARROW)
        self.spatial = SpatialBranch(channels=(NARROW, NARROW, NARROW))
        self.classifier = nn.Conv2d(NARROW, num_classes, 1)
        self.boundary = _pixel_head(1)
        self.direction = _pixel_head(NUM_DIRECTIONS)
        self.targets = BoundaryLabels(max_distance=BAND, min_area=1)

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, K, H, W]."""
        logits, boundary, direction = self.heads(image)
        return refine_logits(logits, boundary, direction) if self.refine else logits

    def heads(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of classes, not refined, of boundary and of directions, all [B, ., H, W]."""
        size = image.shape[2:]
        detail = self.spatial(image)
        (context,) = self.stem(image)
        logits = self.classifier(context + detail)
        return (
            resize_bilinear(logits, size, align_corners=False),
            resize_bilinear(self.boundary(detail), size, align_corners=False),
            resize_bilinear(self.direction(detail), size, align_corners=False),
        )

    def loss(self, batch: Batch) -> Tensor:
        """The losses of UN-EPT; that of refined logits only where there are any."""
        logits, boundary, direction = self.heads(batch.image)
        found = [self.targets(label.to(torch.uint8)) for label in batch.label]
        wanted = {name: torch.stack([f[name] for f in found]).long() for name in found[0]}
        refined, edges, angles = LAMBDAS
        total = task_loss(logits, batch)
        total = total + edges * boundary_cross_entropy(boundary, wanted["boundary"])
        mask = boundary_mask(boundary)
        total = total + angles * direction_cross_entropy(direction, wanted["direction"], mask=mask)
        if self.refine:
            total = total + refined * task_loss(refine_logits(logits, boundary, direction), batch)
        return total


def _pixel_head(out_channels: int) -> nn.Module:
    return nn.Sequential(
        ConvNorm(in_channels=NARROW, out_channels=NARROW, kernel_size=1),
        nn.Conv2d(NARROW, out_channels, 1),
    )


def refinement(num_classes: int) -> nn.Module:
    """With refinement."""
    return Refined(num_classes=num_classes, refine=True)


def refinement_twin(num_classes: int) -> nn.Module:
    """Everything but the refinement."""
    return Refined(num_classes=num_classes, refine=False)


class Detailed(nn.Module):
    """A stem's map of stride 16 at stride 8, plus what a second branch says of stride 8.

    Args:
        num_classes: K.
        spatial: Whether there is a spatial branch; else a filler works on the stem's map.
    """

    def __init__(self, *, num_classes: int, spatial: bool) -> None:
        super().__init__()
        self.stem = Stem((16,), width=NARROW)
        self.up = nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=False)
        branch = SpatialBranch(channels=(NARROW, NARROW, NARROW))
        missing = count_parameters(branch)
        filler = Residual(channels=NARROW, parameters=missing, window=3)
        self.branch = branch if spatial else None
        self.filler = nn.Identity() if spatial else filler
        self.classifier = nn.Conv2d(NARROW, num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, K, H, W]."""
        (coarse,) = self.stem(image)
        x = self.filler(self.up(coarse))
        if self.branch is not None:
            x = x + self.branch(image)
        return resize_bilinear(self.classifier(x), image.shape[2:], align_corners=False)


def spatial(num_classes: int) -> nn.Module:
    """With the spatial branch."""
    return Detailed(num_classes=num_classes, spatial=True)


def spatial_twin(num_classes: int) -> nn.Module:
    """Without it."""
    return Detailed(num_classes=num_classes, spatial=False)
