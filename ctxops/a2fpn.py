"""A²-FPN (Hu et al., CVPR 2021): the neck, assembled from injected parts, and its builders.

Letters: B batch, C_l channels of level l, D pyramid width, H_l W_l map, L levels of the backbone,
M levels of the two paths (L, or L + 1 with a convolved extra level).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ctxops.channel_attention import ChannelAttention
from ctxops.checks import check_choice, check_positive
from ctxops.context import MultiLevelContext
from ctxops.fusion import GuidedBottomUp, GuidedFusion, GuidedTopDown, SumFusion
from ctxops.init import conv2d
from ctxops.lateral import FIRST_LEVEL, ConvLateral, PyramidLateral, level_names
from ctxops.reassembly import IMPLS
from ctxops.resampling import ContentAwarePool, ContentAwareUp, KernelPredictor
from ctxops.resize import subsample

LATERALS = ("mgc", "conv")
TOP_DOWN = ("gacarafe", "carafe", "nearest")
BOTTOM_UP = ("gacap", "cap", "conv", "none")
EXTRA_LEVELS = ("conv", "maxpool")
# Factor of the sigmoid in the channel attention (Eq. 9, Table 5).
GATES = {"2sigmoid": 2.0, "sigmoid": 1.0}


class A2FPN(nn.Module):
    """Pyramid neck: laterals, top-down path, bottom-up path (A²-FPN, section 3).

    The recursions run on maps that have not been through the 3x3 output convolutions; those follow
    each path. Level p2 is the finest one whatever the stride of the backbone.

    Args:
        lateral: L backbone maps to L maps of width D.
        top_down: M - 1 steps (coarse, fine) -> fine, for p2, p3, ...
        output_td: M modules D -> D on the maps of the top-down path, for p2, p3, ...
        bottom_up: M - 1 steps (fine, coarse) -> coarse, for p3, p4, ...; empty: no such path.
        output_bu: Modules D -> D on the coarsest maps of the bottom-up path: M of them, M - 1 to
            leave p2 out, or none where there is no such path.
        extra_level: Module C_L -> D, stride 2, that makes the map above the backbone's coarsest one
            and takes part in both paths; None: the coarsest output is sub-sampled instead.

    Raises:
        ValueError: If the numbers of parts do not fit together.
    """

    def __init__(
        self,
        *,
        lateral: PyramidLateral,
        top_down: Sequence[nn.Module],
        output_td: Sequence[nn.Module],
        bottom_up: Sequence[nn.Module] = (),
        output_bu: Sequence[nn.Module] = (),
        extra_level: nn.Module | None = None,
    ) -> None:
        super().__init__()
        levels = len(lateral.in_channels) + (extra_level is not None)
        got = len(top_down), len(output_td), len(bottom_up), len(output_bu)
        steps = levels - 1
        allowed = [
            (steps, levels, 0, 0),
            (steps, levels, steps, steps),
            (steps, levels, steps, levels),
        ]
        if got not in allowed:
            raise ValueError(
                f"A2FPN with {levels} levels in its paths: expected (top_down, output_td, "
                f"bottom_up, output_bu) of lengths {' or '.join(map(str, allowed))}, got {got}; "
                "pass one part per level and one step per pair of neighbours"
            )
        self.lateral = lateral
        self.extra_level = extra_level
        self.top_down = _by_level(top_down, first=FIRST_LEVEL)
        self.output_td = _by_level(output_td, first=FIRST_LEVEL)
        self.bottom_up = _by_level(bottom_up, first=FIRST_LEVEL + 1)
        self.output_bu = _by_level(output_bu, first=FIRST_LEVEL + levels - len(output_bu))

    @property
    def size_ratio(self) -> int:
        """Pixels of the finest map that must divide its height and width for exact resampling.

        Other sizes work too: maps are rounded up and cropped.
        """
        return 2 ** len(self.top_down)

    def aux_losses(self) -> dict[str, Tensor]:
        """Losses on weights, to be added to the task's in training (Eq. 2).

        Returns:
            {"loss_orthogonal": scalar} for MGC laterals with a positive weight, else nothing.
        """
        return self.lateral.aux_losses()

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Run the neck.

        Args:
            features: L maps [B, C_l, H_l, W_l], fine to coarse; each has half the size of the one
                before, rounded up.

        Returns:
            L + 1 maps [B, D, H_l, W_l], fine to coarse; the last one is half the size of the
            coarsest input, rounded up.

        Raises:
            TypeError: If a level is not a floating point map.
            ValueError: If levels, channels or sizes do not fit.
        """
        levels = list(self.lateral(features))
        if self.extra_level is not None:
            levels.append(self.extra_level(features[-1]))
        outputs = self._bottom_up_path(self._top_down_path(levels))
        if self.extra_level is None:
            outputs.append(subsample(outputs[-1], stride=2))
        return outputs

    def _top_down_path(self, levels: list[Tensor]) -> list[Tensor]:
        merged = [levels[-1]]
        for step, fine in zip(reversed(list(self.top_down.values())), levels[-2::-1], strict=True):
            merged.append(step(merged[-1], fine))
        return _apply(self.output_td, merged[::-1])

    def _bottom_up_path(self, levels: list[Tensor]) -> list[Tensor]:
        if not self.bottom_up:
            return levels
        merged = [levels[0]]
        for step, coarse in zip(self.bottom_up.values(), levels[1:], strict=True):
            merged.append(step(merged[-1], coarse))
        return _apply(self.output_bu, merged)


def _by_level(parts: Sequence[nn.Module], *, first: int) -> nn.ModuleDict:
    return nn.ModuleDict(dict(zip(level_names(len(parts), first=first), parts, strict=True)))


def _apply(modules: nn.ModuleDict, levels: list[Tensor]) -> list[Tensor]:
    """Each module on its own level; levels below the first named one pass through."""
    passed = len(levels) - len(modules)
    convolved = zip(modules.values(), levels[passed:], strict=True)
    return levels[:passed] + [module(level) for module, level in convolved]


@dataclass(frozen=True, kw_only=True)
class _StepFactory:
    """Steps of the two paths, every call with parameters of its own."""

    channels: int
    gate_scale: float
    reduction_channels: int
    kernel_encoder: int
    kernel_up: int
    kernel_down: int
    reassembly: str

    def top_down(self, kind: str) -> nn.Module:
        if kind == "nearest":
            return SumFusion(resample=nn.Upsample(scale_factor=2.0, mode="nearest"))
        guided = kind == "gacarafe"
        predictor = self._predictor(self.kernel_up, guided=guided, scale=2)
        up = ContentAwareUp(predictor=predictor, reassembly=self.reassembly)
        return self._guided(GuidedTopDown, up) if guided else SumFusion(resample=up)

    def bottom_up(self, kind: str) -> nn.Module:
        if kind == "conv":
            return SumFusion(resample=conv2d(self.channels, self.channels, 3, stride=2))
        guided = kind == "gacap"
        predictor = self._predictor(self.kernel_down, guided=guided, stride=2)
        pool = ContentAwarePool(predictor=predictor, reassembly=self.reassembly)
        return self._guided(GuidedBottomUp, pool) if guided else SumFusion(resample=pool)

    def _predictor(
        self, kernel_size: int, *, guided: bool, scale: int = 1, stride: int = 1
    ) -> KernelPredictor:
        return KernelPredictor(
            in_channels=2 * self.channels if guided else self.channels,
            kernel_size=kernel_size,
            scale=scale,
            stride=stride,
            reduction_channels=self.reduction_channels,
            kernel_encoder=self.kernel_encoder,
            num_blends=1 if guided else 0,
        )

    def _guided(self, step: type[GuidedFusion], resample: nn.Module) -> GuidedFusion:
        attention = ChannelAttention(
            in_channels=2 * self.channels,
            hidden_channels=max(1, self.channels // 2),
            gate_scale=self.gate_scale,
        )
        return step(resample=resample, attention=attention)


def build_a2fpn(
    *,
    in_channels: Sequence[int],
    out_channels: int = 256,
    lateral: str = "mgc",
    top_down: str = "gacarafe",
    bottom_up: str = "gacap",
    gcn: bool = True,
    num_contexts: Sequence[int] | None = None,
    context_channels: int = 256,
    gate: str = "2sigmoid",
    extra_level: str = "conv",
    out_conv_p2: bool = True,
    normalize_query: bool = True,
    ortho_weight: float = 1e-4,
    reduction_channels: int = 64,
    kernel_encoder: int = 3,
    kernel_up: int = 5,
    kernel_down: int = 5,
    reassembly: str = "auto",
) -> A2FPN:
    """A²-FPN, its ablations, PAFPN (`conv`, `nearest`, `conv`) and FPN (`conv`, `nearest`, `none`).

    The last two with `extra_level="maxpool"`; PAFPN also with `out_conv_p2=False`. Options of a
    part that is not chosen have no effect.

    Args:
        in_channels: C_l per backbone level, fine to coarse, at least two.
        out_channels: D.
        lateral: `mgc` (multi-level global context) or `conv` (1x1 convolutions).
        top_down: `gacarafe`, `carafe` (kernels from the coarse map alone, plain sum) or `nearest`.
        bottom_up: `gacap`, `cap` (kernels from the fine map alone, plain sum), `conv` or `none`.
        gcn: Graph convolutions between the context vectors.
        num_contexts: Context vectors per level; None: 64 (L - l) for level l = 0, 1, ..., which is
            the paper's 64 (6 - i) for levels 2 to 5.
        context_channels: c, width of a context vector.
        gate: Channel attention by `2sigmoid` or plain `sigmoid`.
        extra_level: `conv` (a stride 2 convolution of the coarsest backbone map, part of both
            paths) or `maxpool` (the coarsest output, sub-sampled).
        out_conv_p2: 3x3 convolution on p2 after the bottom-up path.
        normalize_query: False gives the literal Eq. 3, see `scaled_cosine_attention`.
        ortho_weight: lambda_o of Eq. 2; 0 switches the loss off.
        reduction_channels: Width inside the kernel predictors.
        kernel_encoder: Window of the last convolution of a kernel predictor, odd.
        kernel_up: Window of the content-aware up-sampling, odd.
        kernel_down: Window of the content-aware pooling, odd.
        reassembly: Implementation of `reassemble_up` and `reassemble_down`.

    Returns:
        The neck; 16 661 500 parameters for in_channels (256, 512, 1024, 2048).

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a name is unknown or a size is impossible.
    """
    check_choice(lateral, "lateral", LATERALS)
    check_choice(top_down, "top_down", TOP_DOWN)
    check_choice(bottom_up, "bottom_up", BOTTOM_UP)
    check_choice(gate, "gate", tuple(GATES))
    check_choice(extra_level, "extra_level", EXTRA_LEVELS)
    check_choice(reassembly, "reassembly", IMPLS)
    check_positive(out_channels, "out_channels")
    if lateral == "conv":
        laterals: PyramidLateral = ConvLateral(in_channels=in_channels, out_channels=out_channels)
    else:
        laterals = MultiLevelContext(
            in_channels=in_channels,
            out_channels=out_channels,
            num_contexts=_default_contexts(in_channels) if num_contexts is None else num_contexts,
            context_channels=context_channels,
            gcn=gcn,
            normalize_query=normalize_query,
            ortho_weight=ortho_weight,
        )
    steps = _StepFactory(
        channels=out_channels,
        gate_scale=GATES[gate],
        reduction_channels=reduction_channels,
        kernel_encoder=kernel_encoder,
        kernel_up=kernel_up,
        kernel_down=kernel_down,
        reassembly=reassembly,
    )
    extra = conv2d(in_channels[-1], out_channels, 3, stride=2) if extra_level == "conv" else None
    levels = len(in_channels) + (extra is not None)
    num_up = 0 if bottom_up == "none" else levels - 1
    num_output_bu = num_up + 1 if out_conv_p2 and num_up else num_up
    return A2FPN(
        lateral=laterals,
        top_down=[steps.top_down(top_down) for _ in range(levels - 1)],
        output_td=[conv2d(out_channels, out_channels, 3) for _ in range(levels)],
        bottom_up=[steps.bottom_up(bottom_up) for _ in range(num_up)],
        output_bu=[conv2d(out_channels, out_channels, 3) for _ in range(num_output_bu)],
        extra_level=extra,
    )


def build_a2fpn_lite(
    *,
    in_channels: Sequence[int],
    out_channels: int = 256,
    normalize_query: bool = True,
    ortho_weight: float = 1e-4,
    reassembly: str = "auto",
) -> A2FPN:
    """A²-FPN-Lite: half as many contexts, half as wide; max-pooled extra level; no last p2 conv.

    Args:
        in_channels: C_l per backbone level, fine to coarse, at least two.
        out_channels: D.
        normalize_query: False gives the literal Eq. 3, see `scaled_cosine_attention`.
        ortho_weight: lambda_o of Eq. 2; 0 switches the loss off.
        reassembly: Implementation of `reassemble_up` and `reassemble_down`.

    Returns:
        The neck; 7 997 757 parameters for in_channels (256, 512, 1024, 2048).
    """
    return build_a2fpn(
        in_channels=in_channels,
        out_channels=out_channels,
        num_contexts=[count // 2 for count in _default_contexts(in_channels)],
        context_channels=128,
        extra_level="maxpool",
        out_conv_p2=False,
        normalize_query=normalize_query,
        ortho_weight=ortho_weight,
        reassembly=reassembly,
    )


def _default_contexts(in_channels: Sequence[int]) -> list[int]:
    """64 (6 - i) for levels i = 2..5: finer levels give more vectors."""
    return [64 * (len(in_channels) - level) for level in range(len(in_channels))]
