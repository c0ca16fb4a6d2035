"""Every method of the gym beside its twin: the same network, but for the mechanism.

A twin has the weights of the mechanism (+-10 %) in convolutions or linear layers that see one
position, or 3 x 3 where the method beside it is a neck.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from benchmarks.gym_parts.images import SIDE
from benchmarks.gym_parts.outlines import (
    carafe,
    carafe_twin,
    carafe_twin_behind,
    guided,
    guided_twin,
    refinement,
    refinement_twin,
    spatial,
    spatial_twin,
)
from benchmarks.gym_parts.parts import (
    WIDTH,
    Network,
    On,
    Residual,
    Stem,
    TwoScales,
    count_parameters,
)
from ctxops.a2fpn import A2FPN, build_a2fpn
from ctxops.grounding import GroundingTransformer, SelfTransformer
from ctxops.rendering import RenderingTransformer
from ctxops.segmenter import LinearDecoder, Segmenter
from ctxops.sr import SqueezeReasoning
from ctxops.tokens import MLP
from ctxops.unept import build_context_branch
from ctxops.vit import VisionTransformer

Build = Callable[[int], nn.Module]
_TOKEN_WIDTH = 64


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A method and its twin; both are called with the number of classes.

    Attributes:
        method: Builds the network with the mechanism.
        twin: Builds the one without.
        what: What is compared, in one line.
    """

    method: Build
    twin: Build
    what: str


def segmenter(num_classes: int) -> nn.Module:
    """ViT of patches of 8 pixels, linear decoder."""
    encoder = VisionTransformer(
        image_size=(SIDE, SIDE),
        patch_size=8,
        embed_dim=_TOKEN_WIDTH,
        num_layers=3,
        num_heads=4,
        drop_path_rate=0.0,
    )
    decoder = LinearDecoder(in_channels=_TOKEN_WIDTH, num_classes=num_classes)
    return Segmenter(encoder=encoder, decoder=decoder)


def segmenter_twin(num_classes: int) -> nn.Module:
    """The same tokens; every attention is an MLP on each of them."""
    network = segmenter(num_classes)
    for block in network.encoder.blocks:
        block.attn = MLP(embed_dim=_TOKEN_WIDTH, hidden_dim=2 * _TOKEN_WIDTH)
    return network


def _on_one(make: Callable[[], nn.Module]) -> tuple[Build, Build]:
    """A module on the map of stride 4, and its twin."""

    def method(num_classes: int) -> nn.Module:
        stem = Stem((4,))
        return Network(stem=stem, body=On(make(), 0), num_classes=num_classes)

    def twin(num_classes: int) -> nn.Module:
        stem = Stem((4,))
        filler = Residual(channels=WIDTH, parameters=count_parameters(make()))
        return Network(stem=stem, body=On(filler, 0), num_classes=num_classes)

    return method, twin


def _self_transformer() -> nn.Module:
    return SelfTransformer(channels=WIDTH, norm="BN")


def _squeeze_reasoning() -> nn.Module:
    return SqueezeReasoning(in_channels=WIDTH, nodes=4, norm="BN")


class Levels(nn.Module):
    """Stride 8 and its half as levels, stride 8 as queries of UN-EPT's context branch.

    Args:
        branch: The context branch.
    """

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Two maps -> the queries with context."""
        return fine + self.branch([fine, coarse], fine)


def _unept() -> nn.Module:
    branch = build_context_branch(
        embed_dim=WIDTH,
        num_heads=4,
        num_levels=2,
        num_points=8,
        num_encoder_layers=1,
        num_decoder_layers=1,
        ffn_dim=2 * WIDTH,
        dropout=0.0,
    )
    return Levels(branch)


def unept(num_classes: int) -> nn.Module:
    """Context branch over strides 8 and 16."""
    stem = Stem((8, 16))
    return Network(stem=stem, body=On(_unept(), 0, 1), num_classes=num_classes)


def unept_twin(num_classes: int) -> nn.Module:
    """The queries alone; what the coarse level would cost goes into the filler."""
    stem = Stem((8,))
    missing = count_parameters(_unept()) + count_parameters(Stem((8, 16))) - count_parameters(stem)
    filler = Residual(channels=WIDTH, parameters=missing)
    return Network(stem=stem, body=On(filler, 0), num_classes=num_classes)


class Neck(nn.Module):
    """A pyramid neck, one of its levels, and what fills up the weights of a twin.

    Args:
        neck: Maps to maps.
        level: The level that is classified.
        filler: On that level.
    """

    def __init__(self, neck: A2FPN, level: int, filler: nn.Module) -> None:
        super().__init__()
        self.neck = neck
        self.level = level
        self.filler = filler

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps -> the map of one level."""
        return self.filler(self.neck(maps)[self.level])


def _neck(**parts: str) -> A2FPN:
    chosen = {"lateral": "conv", "top_down": "nearest", "bottom_up": "none"} | parts
    return build_a2fpn(
        in_channels=(WIDTH, WIDTH),
        out_channels=WIDTH,
        num_contexts=(16, 8),
        context_channels=WIDTH,
        reduction_channels=16,
        extra_level="maxpool",
        out_conv_p2=False,
        ortho_weight=0.0,
        **chosen,
    )


def _necks(
    make_stem: Callable[[], nn.Module], level: int, window: int, **parts: str
) -> tuple[Build, Build]:
    """A neck with some parts of A²-FPN, and FPN with as many weights more."""

    def method(num_classes: int) -> nn.Module:
        stem = make_stem()
        body = Neck(_neck(**parts), level, nn.Identity())
        return Network(stem=stem, body=body, num_classes=num_classes)

    def twin(num_classes: int) -> nn.Module:
        stem = make_stem()
        plain = _neck()
        missing = count_parameters(_neck(**parts)) - count_parameters(plain)
        filler = Residual(channels=WIDTH, parameters=missing, window=window)
        return Network(stem=stem, body=Neck(plain, level, filler), num_classes=num_classes)

    return method, twin


def _on_two(make: Callable[[], nn.Module], target: int) -> tuple[Build, Build]:
    """A module of (target, other level), added to the target as in FPT, and its twin."""

    def method(num_classes: int) -> nn.Module:
        stem = TwoScales()
        body = Added(make(), target)
        return Network(stem=stem, body=body, num_classes=num_classes)

    def twin(num_classes: int) -> nn.Module:
        stem = TwoScales(only=target)
        unused = count_parameters(TwoScales()) - count_parameters(stem)
        filler = Residual(channels=WIDTH, parameters=count_parameters(make()) + unused)
        return Network(stem=stem, body=On(filler, 0), num_classes=num_classes)

    return method, twin


class Added(nn.Module):
    """x + what another level gives it.

    Args:
        module: Called with x and the other level.
        target: Number of x among the two maps.
    """

    def __init__(self, module: nn.Module, target: int) -> None:
        super().__init__()
        self.module = module
        self.target = target

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Two maps -> the target, enriched."""
        x, other = maps[self.target], maps[1 - self.target]
        return x + self.module(x, other)


def _pair(builds: tuple[Build, Build], what: str) -> Pair:
    return Pair(method=builds[0], twin=builds[1], what=what)


PAIRS = {
    "Segmenter": _pair(
        (segmenter, segmenter_twin), "ViT, 3 layers; attention against an MLP on each token"
    ),
    "FPT ST": _pair(_on_one(_self_transformer), "Self-Transformer against 1x1 convolutions"),
    "SR": _pair(_on_one(_squeeze_reasoning), "Squeeze Reasoning against 1x1 convolutions"),
    "UN-EPT": _pair((unept, unept_twin), "context branch against 1x1 convolutions"),
    "A²-FPN MGC": _pair(
        _necks(lambda: Stem((4, 8)), 0, 1, lateral="mgc"),
        "FPN with multi-level global context against FPN with 1x1 convolutions",
    ),
    "A²-FPN": _pair(
        _necks(TwoScales, 0, 3, lateral="mgc", top_down="gacarafe"),
        "context and guided top-down path against FPN with 3x3 convolutions",
    ),
    "FPT GT": _pair(
        _on_two(lambda: GroundingTransformer(channels=WIDTH, norm="BN"), 0),
        "Grounding Transformer against 1x1 convolutions of the fine level",
    ),
    "FPT RT": _pair(
        _on_two(lambda: RenderingTransformer(channels=WIDTH, gap=1, norm="BN"), 1),
        "Rendering Transformer against 1x1 convolutions of the coarse level",
    ),
    "CARAFE": _pair(
        (carafe, carafe_twin), "content-aware against 3x3 convolutions on the coarse map, bilinear"
    ),
    "CARAFE, conv behind": _pair(
        (carafe, carafe_twin_behind), "content-aware against bilinear, 3x3 convolutions behind it"
    ),
    "A²-FPN GACARAFE": _pair(
        (guided, guided_twin), "guided content-aware against bilinear + 3x3 convolutions"
    ),
    "UN-EPT refinement": _pair(
        (refinement, refinement_twin), "logits refined along directions, against not refined"
    ),
    "UN-EPT spatial": _pair(
        (spatial, spatial_twin), "spatial branch against 3x3 convolutions of the stem's map"
    ),
}
