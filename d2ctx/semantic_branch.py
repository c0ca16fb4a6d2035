"""The semantic branch of Hybrid Task Cascade: what is where in the image, things and stuff.

Chen et al., "Hybrid Task Cascade for Instance Segmentation", CVPR 2019, section 3.4.

Letters: B batch, C channels of the pyramid, D width of the branch, K semantic classes; h, w size of
the common map (1/8 of the image).
"""

from collections.abc import Sequence

import fvcore.nn.weight_init as weight_init
import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor, nn

from ctxops.losses import count_valid, cross_entropy, mean_over_processes
from ctxops.precision import widen
from ctxops.resize import resize_bilinear


class SemanticBranch(nn.Module):
    """Sum of all pyramid maps at one size, convolved, with a prediction and an embedding.

    Every map is resized to the common one (bilinear, corners aligned), then goes through its own
    1x1 convolution and ReLU, and all are summed. Four 3x3 convolutions with ReLU follow; from the
    result a 1x1 convolution predicts the classes, and another one with ReLU makes the embedding
    that is added to the features of every RoI.

    Args:
        input_shape: The pyramid's maps.
        in_features: Names of the maps to sum.
        num_classes: K.
        embed_dim: Channels of the embedding; those of the RoI features that it is added to.
        pooler: Takes the embedding alone and makes [R, embed_dim, h', w'].
        common_feature: The one of `in_features` whose size is taken.
        width: D.
        num_convs: How many 3x3 convolutions.
        ignore_index: Label that the loss leaves out.
        loss_weight: Factor of the loss.

    Raises:
        ValueError: If a map is absent, or the common one is not among the summed.
    """

    def __init__(
        self,
        *,
        input_shape: dict[str, ShapeSpec],
        in_features: Sequence[str],
        num_classes: int,
        embed_dim: int,
        pooler: ROIPooler,
        common_feature: str = "p3",
        width: int = 256,
        num_convs: int = 4,
        ignore_index: int = 255,
        loss_weight: float = 0.2,
    ) -> None:
        super().__init__()
        if absent := [name for name in in_features if name not in input_shape]:
            raise ValueError(
                f"the semantic branch needs the maps {list(in_features)}, but {absent} are not "
                f"among the backbone's {list(input_shape)}; name some of these"
            )
        if common_feature not in in_features:
            raise ValueError(
                f"the common map must be one of {list(in_features)}, got {common_feature!r}"
            )
        self.in_features = tuple(in_features)
        self.common_feature = common_feature
        self.ignore_index = ignore_index
        self.loss_weight = loss_weight
        self.lateral = nn.ModuleDict(
            {name: _conv(input_shape[name].channels, width, kernel=1) for name in in_features}
        )
        self.convs = nn.Sequential(*(_conv(width, width, kernel=3) for _ in range(num_convs)))
        self.predictor = _conv(width, num_classes, kernel=1, relu=False)
        self.embedding = _conv(width, embed_dim, kernel=1)
        self.pooler = pooler

    def forward(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Predict the classes and embed.

        Args:
            features: Map name -> [B, C, H, W].

        Returns:
            Logits [B, K, h, w] and embedding [B, embed_dim, h, w].
        """
        size = features[self.common_feature].shape[-2:]
        # Resized before the 1x1 convolution, as the authors' code does.
        resized = [
            (name, resize_bilinear(widen(features[name]), size, align_corners=True))
            for name in self.in_features
        ]
        x = self.convs(sum(self.lateral[name](x) for name, x in resized))
        return self.predictor(x), self.embedding(x)

    def pool(self, embedding: Tensor, boxes: list[Boxes], size: Sequence[int]) -> Tensor:
        """Features of the embedding in given boxes.

        Args:
            embedding: [B, embed_dim, h, w].
            boxes: R_i boxes of each image, corners in pixels of the image.
            size: (height, width) of the result; pooled finer, it is the mean over bins.

        Returns:
            [R, embed_dim, height, width].
        """
        pooled = self.pooler([widen(embedding)], boxes)
        same = tuple(pooled.shape[-2:]) == tuple(size)
        return pooled if same else F.adaptive_avg_pool2d(pooled, tuple(size))

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Weighted cross entropy against the labels at the common size (nearest).

        Args:
            logits: [B, K, h, w].
            targets: [B, H, W], integer labels in 0..K-1 or `ignore_index`, at image size.

        Returns:
            Scalar: the mean over all pixels that count, 0 where none does. With several processes,
            the mean over these scalars is the mean over the pixels of all.
        """
        labels = F.interpolate(targets[:, None].float(), size=logits.shape[-2:], mode="nearest")
        labels = labels[:, 0].long()
        count = mean_over_processes(count_valid(labels, ignore_index=self.ignore_index))
        loss = cross_entropy(logits, labels, num_valid=count, ignore_index=self.ignore_index)
        return self.loss_weight * loss


def _conv(in_channels: int, out_channels: int, *, kernel: int, relu: bool = True) -> Conv2d:
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size=kernel,
        padding=kernel // 2,
        activation=nn.ReLU() if relu else None,
    )
    weight_init.c2_msra_fill(conv)
    return conv
