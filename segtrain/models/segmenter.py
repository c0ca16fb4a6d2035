"""Segmenter from its configuration."""

from torch import Tensor, nn

from ctxops.segmenter import LinearDecoder, MaskTransformer, Segmenter
from ctxops.vit import VisionTransformer
from segtrain.config.schema import SegmenterConfig
from segtrain.models.pretrained import normalisation_of


class SegmenterModel(Segmenter):
    """`ctxops.Segmenter` as the trainer sees it; the parameters keep the official names.

    Args:
        encoder: As in `ctxops.Segmenter`.
        decoder: As in `ctxops.Segmenter`.
        normalisation: The pixels the encoder expects, `vit` or `imagenet`.
    """

    def __init__(
        self, *, encoder: VisionTransformer, decoder: nn.Module, normalisation: str
    ) -> None:
        super().__init__(encoder=encoder, decoder=decoder)
        self.normalisation = normalisation

    def forward(self, image: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Segment.

        Args:
            image: Normalised RGB image [B, 3, H, W] of any size.

        Returns:
            `logits` -> [B, K, H, W].

        Raises:
            TypeError: If `image` is not floating point.
            ValueError: If `image` is not [B, 3, H, W].
        """
        return {"logits": super().forward(image)}

    def backbone_parameters(self) -> tuple[str, ...]:
        """What the names of the encoder's parameters begin with."""
        return ("encoder.",)

    def class_parameters(self) -> tuple[str, ...]:
        """Names of the parameters whose shape depends on the number of classes."""
        if isinstance(self.decoder, LinearDecoder):
            return ("decoder.head.weight", "decoder.head.bias")
        return ("decoder.cls_emb", "decoder.mask_norm.weight", "decoder.mask_norm.bias")


def build_segmenter(
    config: SegmenterConfig, *, num_classes: int, image_size: tuple[int, int]
) -> SegmenterModel:
    """Build a Segmenter with random weights; no file is read.

    Args:
        config: The model.
        num_classes: K.
        image_size: (H, W) of a training crop: the position table is made for its grid.

    Returns:
        The model.

    Raises:
        UserError: If `pretrained` does not fit the model.
        ValueError: If a size is impossible.
    """
    normalisation = normalisation_of(config)
    embed_dim, num_layers, num_heads = config.widths
    encoder = VisionTransformer(
        image_size=image_size,
        patch_size=config.patch_size,
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        distilled=config.distilled,
        dropout=config.dropout,
        drop_path_rate=config.drop_path_rate,
        layer_norm_eps=config.layer_norm_eps,
        pos_embed_resize=config.pos_embed_resize,
    )
    decoder = _decoder(config, num_classes)
    return SegmenterModel(encoder=encoder, decoder=decoder, normalisation=normalisation)


def _decoder(config: SegmenterConfig, num_classes: int) -> nn.Module:
    embed_dim, _, num_heads = config.widths
    if config.decoder == "linear":
        return LinearDecoder(in_channels=embed_dim, num_classes=num_classes)
    return MaskTransformer(
        in_channels=embed_dim,
        num_classes=num_classes,
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_layers=config.decoder_layers,
        dropout=config.decoder_dropout,
        drop_path_rate=config.decoder_drop_path,
        layer_norm_eps=config.decoder_layer_norm_eps or config.layer_norm_eps,
        normalize_classes=config.normalize_classes,
    )
