"""A backbone and a head as one model.

Letters: B batch, K classes, H W image, h w map.
"""

from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor, nn

from ctxops.heads.em_attention import EMAttention
from ctxops.norm import ConvNorm
from ctxops.resize import crop, resize_bilinear
from ctxops.tokens import pad_to_multiple
from segtrain.config.network import AuxConfig, NetworkConfig
from segtrain.errors import UserError
from segtrain.models.backbones import build_backbone
from segtrain.models.heads import build_head
from segtrain.models.maps import Maps, deepest

# What PyTorch and pyramid pooling say of a batch norm that has one number per channel.
_ONE_VALUE = ("Expected more than 1 value per channel", "expected at least 2 images in training")


class AuxHead(nn.Module):
    """3x3 convolution with bias, norm, ReLU, and a classifier; for training.

    Args:
        feature: Name of the map it reads.
        in_channels: Channels of that map.
        channels: Width of the convolution.
        num_classes: K.
        dropout: Before the classifier, of whole channels.
    """

    def __init__(
        self, *, feature: str, in_channels: int, channels: int, num_classes: int, dropout: float
    ) -> None:
        super().__init__()
        self.feature = feature
        self.conv = ConvNorm(
            in_channels=in_channels, out_channels=channels, kernel_size=3, bias=True
        )
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Classify.

        Args:
            x: Map [B, in_channels, h, w].

        Returns:
            Logits [B, K, h, w].
        """
        return self.classifier(self.dropout(self.conv(x)))


class Network(nn.Module):
    """Backbone, head, and in training an auxiliary head.

    Args:
        backbone: Image to named maps; see `build_backbone`.
        head: Maps and image to outputs; see `build_head`.
        aux_head: From one map to logits, or None.
        align_corners: Of the resizing of logits to the image.
        freeze_backbone: Whether the backbone never changes: neither its parameters nor the
            statistics of its norms.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        head: nn.Module,
        aux_head: AuxHead | None = None,
        align_corners: bool = False,
        freeze_backbone: bool = False,
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.aux_head = backbone, head, aux_head
        self.normalisation: str = backbone.normalisation
        self.align_corners = align_corners
        self.freeze_backbone = freeze_backbone
        if freeze_backbone:
            backbone.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Switch to training or evaluation; a frozen backbone stays in evaluation mode.

        Args:
            mode: True for training.

        Returns:
            The network.
        """
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def forward(self, image: Tensor) -> dict[str, Any]:
        """Segment.

        Args:
            image: Normalised RGB image [B, 3, H, W].

        Returns:
            What the head gives, its "logits" resized to [B, K, H, W]; in training "aux", a list
            of logits of that size.

        Raises:
            UserError: If a batch norm gets one number per channel in training.
        """
        try:
            return self._segment(image)
        except ValueError as error:
            if not any(text in str(error) for text in _ONE_VALUE):
                raise
            raise UserError(_one_value(image)) from error

    def _segment(self, image: Tensor) -> dict[str, Any]:
        size = image.shape[2:]
        image = pad_to_multiple(image, getattr(self.backbone, "multiple", 1))
        features = self.backbone(image)
        outputs: dict[str, Any] = self.head(features, image)
        outputs["logits"] = self._resized(outputs["logits"], image)
        if self.training and self.aux_head is not None:
            coarse = self.aux_head(features[self.aux_head.feature])
            outputs["aux"] = [self._resized(coarse, image)]
        return outputs if image.shape[2:] == size else _without_padding(outputs, size)

    def _resized(self, logits: Tensor, image: Tensor) -> Tensor:
        return resize_bilinear(logits, image.shape[2:], align_corners=self.align_corners)

    def after_update(self) -> None:
        """What no gradient moves: the bases of `EMAttention`. Once after every training step."""
        for part in self.head.modules():
            if isinstance(part, EMAttention):
                part.update_bases()

    def backbone_parameters(self) -> tuple[str, ...]:
        """What the names of the backbone's parameters begin with."""
        return ("backbone.",)

    def no_weight_decay(self) -> set[str]:
        """Names of tables and tokens, which no weight decay shall pull to zero."""
        return {
            f"{part}.{name}"
            for part in ("backbone", "head")
            for name in getattr(self.get_submodule(part), "no_weight_decay", set)()
        }

    def class_parameters(self) -> tuple[str, ...]:
        """Names of the parameters whose shape depends on the number of classes."""
        parts = ("head.classifier.", "aux_head.classifier.")
        return tuple(name for name, _ in self.named_parameters() if name.startswith(parts))


def build_network(
    config: NetworkConfig, *, num_classes: int, image_size: tuple[int, int]
) -> Network:
    """Build a network with random weights; no file is read.

    Args:
        config: The section `model`.
        num_classes: K.
        image_size: (H, W) of a training crop.

    Returns:
        The model.

    Raises:
        UserError: If the backbone does not offer what the head needs.
    """
    backbone = build_backbone(config.backbone, image_size=image_size)
    maps: Maps = backbone.maps
    head = build_head(config.head, maps, num_classes=num_classes, image_size=image_size)
    return Network(
        backbone=backbone,
        head=head,
        aux_head=_aux_head(config.aux, maps, num_classes),
        align_corners=config.align_corners,
        freeze_backbone=config.freeze_backbone,
    )


def _without_padding(outputs: dict[str, Any], size: Sequence[int]) -> dict[str, Any]:
    """Cut what stands on the padded image."""
    aux = [crop(logits, size) for logits in outputs.pop("aux", ())]
    cut = {name: crop(x, size) for name, x in outputs.items()}
    return {**cut, "aux": aux} if aux else cut


def _one_value(image: Tensor) -> str:
    count, _, height, width = image.shape
    return (
        "a batch norm gets one value per channel to train on: its map is 1x1, by pooling or as the "
        f"image is small, and there is {count} of {height}x{width}; write train.micro_batch: 2 "
        "(and a train.global_batch of at least 2), raise data.crop if the map is small, or take a "
        "head that does not pool whole images (several GPUs: train.sync_bn: true)"
    )


def _aux_head(config: AuxConfig | None, maps: Maps, num_classes: int) -> AuxHead | None:
    if config is None:
        return None
    name, _ = deepest(maps, 2, head="the auxiliary head")
    return AuxHead(
        feature=name,
        in_channels=maps[name].channels,
        channels=config.channels,
        num_classes=num_classes,
        dropout=config.dropout,
    )
