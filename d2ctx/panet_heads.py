"""The augmented head of FPT's Table 3: PANet's heads on features pooled from all levels.

Liu et al., "Path Aggregation Network for Instance Segmentation", CVPR 2018: adaptive feature
pooling (3.2), the heavier box head (4.1) and fully-connected fusion in the mask head (3.3).

Letters: B batch, R regions, L levels, C channels of the pyramid, D width of a head, K classes, s
side of a pooled region.
"""

from collections.abc import Sequence
from typing import Any

import fvcore.nn.weight_init as weight_init
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ConvTranspose2d, ShapeSpec
from detectron2.modeling import BaseMaskRCNNHead, StandardROIHeads
from torch import Tensor, nn

from d2ctx.errors import UserError
from d2ctx.panet_layers import AllLevelPooler, FusedConv, conv3x3


class PANetBoxHead(nn.Module):
    """Fused convolution, further 3x3 convolutions, fully connected layers, ReLU after each.

    Args:
        input_shape: C and s.
        levels: Names of the L levels.
        conv_dims: Width of each convolution, at least one.
        fc_dims: Width of each fully connected layer, at least one.
        conv_norm: Norm of the convolutions.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        levels: Sequence[str],
        conv_dims: Sequence[int],
        fc_dims: Sequence[int],
        conv_norm: str = "GN",
    ) -> None:
        super().__init__()
        first, *further = conv_dims
        self.fuse = FusedConv(
            in_channels=input_shape.channels, out_channels=first, levels=levels, norm=conv_norm
        )
        widths = zip(conv_dims, further, strict=False)
        self.convs = nn.Sequential(*(conv3x3(a, b, conv_norm) for a, b in widths))
        sizes = [conv_dims[-1] * input_shape.height * input_shape.width, *fc_dims]
        layers: list[nn.Module] = [nn.Flatten()]
        for size, width in zip(sizes, fc_dims, strict=False):
            layers += [_linear(size, width), nn.ReLU()]
        self.fcs = nn.Sequential(*layers)
        self._width = fc_dims[-1]

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Keywords of the constructor.

        Args:
            cfg: Configuration; `MODEL.ROI_BOX_HEAD` is read.
            input_shape: C and s.

        Returns:
            Keyword -> value.

        Raises:
            UserError: If the region heads do not pool from all levels, or layers are missing.
        """
        node = cfg.MODEL.ROI_BOX_HEAD
        _check(cfg, "ROI_BOX_HEAD", NUM_CONV=1, NUM_FC=1)
        return {
            "input_shape": input_shape,
            "levels": cfg.MODEL.ROI_HEADS.IN_FEATURES,
            "conv_dims": [node.CONV_DIM] * node.NUM_CONV,
            "fc_dims": [node.FC_DIM] * node.NUM_FC,
            "conv_norm": node.NORM,
        }

    @property
    def output_shape(self) -> ShapeSpec:
        """Width of the vectors."""
        return ShapeSpec(channels=self._width)

    def forward(self, x: Tensor) -> Tensor:
        """Turn pooled regions into vectors.

        Args:
            x: [R, L, C, s, s].

        Returns:
            [R, width].
        """
        return self.fcs(self.convs(self.fuse(x)))


class PANetMaskHead(BaseMaskRCNNHead):
    """Mask head with fully-connected fusion (PANet, 3.3).

    Convolutional path: fused convolution, 3x3 convolutions, deconvolution, 1x1 convolution to K
    masks. A second path leaves in front of the last 3x3 convolution: two of its own, the second of
    half the width, and one fully connected layer to a mask without class, which is added to all K.

    Deviation: the fully connected layer is linear; the authors' code has a ReLU behind it, with
    which it could only add foreground.

    Args:
        input_shape: C and s.
        levels: Names of the L levels.
        num_classes: K; 1 for masks without class.
        conv_dim: D, even.
        num_conv: 3x3 convolutions of the first path, at least two.
        conv_norm: Norm of the convolutions.
        loss_weight: Factor of the loss.
        vis_period: Steps between pictures of masks; 0 for none.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        levels: Sequence[str],
        num_classes: int,
        conv_dim: int = 256,
        num_conv: int = 4,
        conv_norm: str = "GN",
        loss_weight: float = 1.0,
        vis_period: int = 0,
    ) -> None:
        super().__init__(loss_weight=loss_weight, vis_period=vis_period)
        self.fuse = FusedConv(
            in_channels=input_shape.channels, out_channels=conv_dim, levels=levels, norm=conv_norm
        )
        shared = [conv3x3(conv_dim, conv_dim, conv_norm) for _ in range(num_conv - 2)]
        self.shared = nn.Sequential(*shared)
        self.conv = conv3x3(conv_dim, conv_dim, conv_norm)
        self.deconv = ConvTranspose2d(conv_dim, conv_dim, kernel_size=2, stride=2)
        weight_init.c2_msra_fill(self.deconv)
        self.predictor = Conv2d(conv_dim, num_classes, kernel_size=1)
        nn.init.normal_(self.predictor.weight, std=0.001)
        nn.init.zeros_(self.predictor.bias)
        half, side = conv_dim // 2, 2 * input_shape.height
        self.fc_convs = nn.Sequential(
            conv3x3(conv_dim, conv_dim, conv_norm), conv3x3(conv_dim, half, conv_norm)
        )
        self.fc = nn.Linear(half * input_shape.height * input_shape.width, side * side)
        nn.init.normal_(self.fc.weight, std=0.001)
        nn.init.zeros_(self.fc.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Keywords of the constructor.

        Args:
            cfg: Configuration; `MODEL.ROI_MASK_HEAD` is read.
            input_shape: C and s.

        Returns:
            Keyword -> value.

        Raises:
            UserError: If the region heads do not pool from all levels, or layers are missing.
        """
        node = cfg.MODEL.ROI_MASK_HEAD
        _check(cfg, "ROI_MASK_HEAD", NUM_CONV=2)
        return super().from_config(cfg, input_shape) | {
            "input_shape": input_shape,
            "levels": cfg.MODEL.ROI_HEADS.IN_FEATURES,
            "num_classes": 1 if node.CLS_AGNOSTIC_MASK else cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "conv_dim": node.CONV_DIM,
            "num_conv": node.NUM_CONV,
            "conv_norm": node.NORM,
        }

    def layers(self, x: Tensor) -> Tensor:
        """Predict masks.

        Args:
            x: [R, L, C, s, s].

        Returns:
            Logits [R, K, 2 s, 2 s].
        """
        x = self.shared(self.fuse(x))
        masks = self.predictor(self.deconv(self.conv(x)).relu())
        added = self.fc(self.fc_convs(x).flatten(1))
        return masks + added.view(-1, 1, *masks.shape[-2:])


class PANetROIHeads(StandardROIHeads):
    """Detectron2's box and mask heads; those of PANet get features pooled from all levels."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Keywords of the constructor.

        Args:
            cfg: Configuration.
            input_shape: The pyramid's maps.

        Returns:
            Keyword -> value.
        """
        keywords = super().from_config(cfg, input_shape)
        scales = [1.0 / input_shape[name].stride for name in cfg.MODEL.ROI_HEADS.IN_FEATURES]
        for kind, head in (("box", PANetBoxHead), ("mask", PANetMaskHead)):
            if isinstance(keywords.get(f"{kind}_head"), head):
                node = cfg.MODEL[f"ROI_{kind.upper()}_HEAD"]
                keywords[f"{kind}_pooler"] = AllLevelPooler(
                    output_size=node.POOLER_RESOLUTION,
                    scales=scales,
                    sampling_ratio=node.POOLER_SAMPLING_RATIO,
                    pooler_type=node.POOLER_TYPE,
                )
        return keywords


def _check(cfg: CfgNode, section: str, **least: int) -> None:
    node, heads = cfg.MODEL[section], cfg.MODEL.ROI_HEADS.NAME
    if heads != PANetROIHeads.__name__:
        raise UserError(
            f"MODEL.{section}.NAME {node.NAME} needs features pooled from all levels, which "
            f"MODEL.ROI_HEADS.NAME {heads} does not give; set it to {PANetROIHeads.__name__}"
        )
    for key, count in least.items():
        if node[key] < count:
            raise UserError(
                f"MODEL.{section}.{key} must be at least {count} for {node.NAME}, got {node[key]}"
            )


def _linear(in_features: int, out_features: int) -> nn.Linear:
    layer = nn.Linear(in_features, out_features)
    weight_init.c2_xavier_fill(layer)
    return layer
