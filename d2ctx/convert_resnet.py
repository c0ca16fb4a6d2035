"""ResNet and ResNeXt weights of other packages as Detectron2's ResNet takes them.

What leaves no trace in a file is not seen: the stride in a 1x1 or 3x3 convolution, blurred or
average pooling without weights, scaled (weight-standardised) convolutions.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, build_resnet_backbone
from torch import Tensor

from d2ctx.convert_names import CAFFE2, Naming, find_naming
from d2ctx.errors import UserError
from d2ctx.weight_report import WeightReport, compare_state, part_of
from d2ctx.wording import first_of

# Bottleneck or not, blocks of each stage -> depth.
DEPTHS = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}
STEM = "stem.conv1.weight"
# Where Detectron2's own tool puts torchvision's classifier.
_CLASSIFIER = ("stem.fc.weight", "stem.fc.bias")
_DEEP_STEM = re.compile(r"^(stem\.|conv1\.)\d|^stem\.conv2\.")
_POOLED_SHORTCUT = re.compile(r"\.downsample\.2\.")
_COUNTER = ".num_batches_tracked"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The keys of MODEL.RESNETS that decide the shapes.

    Attributes:
        depth: 18, 34, 50, 101 or 152.
        num_groups: Groups of the 3x3 convolutions.
        width_per_group: Their width per group in res2.
        norm: "FrozenBN", or "GN" where there are no running statistics.
    """

    depth: int
    num_groups: int = 1
    width_per_group: int = 64
    norm: str = "FrozenBN"

    @property
    def name(self) -> str:
        """Torchvision's name of it, as `resnext101_64x4d`."""
        if self.num_groups > 1:
            return f"resnext{self.depth}_{self.num_groups}x{self.width_per_group}d"
        if self.width_per_group == 64:
            return f"resnet{self.depth}"
        return f"wide_resnet{self.depth}_{self.width_per_group // 64}"

    def config(self) -> CfgNode:
        """Detectron2's configuration of it."""
        cfg = get_cfg()
        node = cfg.MODEL.RESNETS
        node.DEPTH, node.NORM = self.depth, self.norm
        node.NUM_GROUPS, node.WIDTH_PER_GROUP = self.num_groups, self.width_per_group
        node.STRIDE_IN_1X1, node.OUT_FEATURES = False, ["res2", "res3", "res4", "res5"]
        if self.depth < 50:
            node.RES2_OUT_CHANNELS = 64
        return cfg

    def build(self) -> Backbone:
        """Detectron2's ResNet without values, on the meta device."""
        with torch.device("meta"):
            return build_resnet_backbone(self.config(), ShapeSpec(channels=3))


@dataclass(frozen=True, kw_only=True)
class ResNetWeights:
    """A file's ResNet under Detectron2's names.

    Attributes:
        naming: How the file names its tensors.
        architecture: What they belong to.
        tensors: Detectron2's name -> float32 values, all that were found.
        original: Detectron2's name -> the file's.
        report: How they fit the architecture's ResNet.
        folded: Biases that went into the running mean of the norm behind, by Detectron2's name.
    """

    naming: Naming
    architecture: Architecture
    tensors: Mapping[str, Tensor]
    original: Mapping[str, str]
    report: WeightReport
    folded: tuple[str, ...] = field(default=())

    @property
    def left_out(self) -> tuple[str, ...]:
        """The file's names of the tensors that no ResNet of Detectron2 has."""
        return tuple(self.original[name] for name in self.report.unexpected)

    def problem(self) -> str:
        """Why the tensors are no Detectron2 ResNet, or "" where they are one."""
        kernel = self.tensors[STEM].shape[-1] if STEM in self.tensors else 7
        if kernel != 7 or any(_DEEP_STEM.search(n) for n in self.report.unexpected):
            return (
                "it has a DEEP STEM (several 3x3 convolutions), Detectron2's ResNet one 7x7 "
                "convolution: a run would start with a random stem; take weights with a 7x7 stem, "
                "such as torchvision's, or timm's whose name has no letter behind the depth"
            )
        if any(_POOLED_SHORTCUT.search(name) for name in self.left_out):
            return (
                "it has average pooling in its shortcuts (ResNet-D), Detectron2's ResNet has not; "
                "take weights of the plain ResNet"
            )
        if foreign := self._foreign():
            return (
                f"it has parts that Detectron2's ResNet lacks ({first_of(foreign)}); take weights "
                "of the plain network"
            )
        if self.report.missing or self.report.wrong_shape:
            return (
                f"{len(self.report.missing)} tensors are missing and "
                f"{len(self.report.wrong_shape)} have another shape; take complete weights of a "
                "ResNet or ResNeXt"
            )
        return ""

    def _foreign(self) -> list[str]:
        """The file's names of tensors inside the stages that have no place."""
        inside = {part_of(name) for name in self.report.matched}
        unexpected = [n for n in self.report.unexpected if n not in _CLASSIFIER]
        return [self.original[n] for n in unexpected if part_of(n) in inside]

    def usable(self) -> dict[str, Tensor]:
        """The tensors that Detectron2's ResNet takes, in the order of its own."""
        return {name: self.tensors[name].contiguous() for name in self.report.matched}


def translate(weights: Mapping[str, Tensor | np.ndarray]) -> ResNetWeights:
    """Give a ResNet's tensors Detectron2's names and compare them with Detectron2's ResNet.

    Affine norms without running statistics (Caffe2) get those of the identity, as Detectron2 gives
    them when it loads such a file. A bias in front of a norm goes into the norm's running mean,
    which changes nothing; Detectron2 itself drops it.

    Args:
        weights: Tensor name -> values of a file.

    Returns:
        The tensors and how they fit; see `ResNetWeights.problem`.

    Raises:
        UserError: If the file holds no ResNet, or none of a depth that Detectron2 has.
    """
    naming = find_naming(weights)
    named = {n: v for n, v in weights.items() if not n.endswith(_COUNTER)}
    original = {new: old for old, new in naming.rename(named).items()}
    tensors = {new: _as_float(named[old]) for new, old in original.items()}
    if naming.kind == CAFFE2:
        tensors |= _identity_statistics(tensors, original)
    architecture = find_architecture(tensors)
    model = architecture.build()
    folded = _fold_biases(tensors, expected=model.state_dict())
    return ResNetWeights(
        naming=naming,
        architecture=architecture,
        tensors=tensors,
        original=original,
        report=compare_state(model, tensors),
        folded=folded,
    )


def find_architecture(tensors: Mapping[str, Tensor]) -> Architecture:
    """Read depth, groups and width off the tensors.

    Args:
        tensors: Under Detectron2's names.

    Returns:
        The architecture.

    Raises:
        UserError: If Detectron2 has no ResNet of this depth.
    """
    blocks = Counter(".".join(n.split(".")[:2]) for n in tensors if n.endswith(".conv1.weight"))
    stages = tuple(sum(b.startswith(f"res{stage}.") for b in blocks) for stage in range(2, 6))
    bottleneck = "res2.0.conv3.weight" in tensors
    depth = DEPTHS.get((bottleneck, stages))
    if depth is None:
        kind = "bottleneck" if bottleneck else "basic"
        raise UserError(
            f"expected a ResNet of depth {', '.join(str(d) for d in DEPTHS.values())}, got stages "
            f"of {stages} {kind} blocks; take weights of one of these depths"
        )
    norm = "FrozenBN" if "res2.0.conv1.norm.running_mean" in tensors else "GN"
    if not bottleneck:
        return Architecture(depth=depth, norm=norm)
    width, per_group = tensors["res2.0.conv2.weight"].shape[:2]
    return Architecture(
        depth=depth, num_groups=width // per_group, width_per_group=per_group, norm=norm
    )


def _as_float(value: Tensor | np.ndarray) -> Tensor:
    tensor = torch.as_tensor(value)
    return tensor.float() if tensor.is_floating_point() else tensor


def _identity_statistics(
    tensors: Mapping[str, Tensor], original: Mapping[str, str]
) -> dict[str, Tensor]:
    """Running statistics of Caffe2's affine layers; group norms (`_gn_`) have none."""
    statistics = {}
    for name, weight in tensors.items():
        norm, _, last = name.rpartition(".")
        if last == "weight" and norm.endswith(".norm") and "_gn_" not in original[name]:
            statistics[f"{norm}.running_mean"] = torch.zeros_like(weight)
            statistics[f"{norm}.running_var"] = torch.ones_like(weight)
    return {name: value for name, value in statistics.items() if name not in tensors}


def _fold_biases(tensors: dict[str, Tensor], *, expected: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Move biases that the model lacks into the running mean behind them, in place."""
    folded = []
    for name in list(tensors):
        mean = f"{name.removesuffix('.bias')}.norm.running_mean"
        if name.endswith(".bias") and name not in expected and mean in tensors:
            tensors[mean] = tensors[mean] - tensors.pop(name)
            folded.append(name)
    return tuple(folded)
