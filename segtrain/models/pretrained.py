"""Pretrained encoders: which weights of timm belong to a variant, and the pixels they expect.

The tags are pinned: the same name without a tag gives other weights today than it gave the authors.
"""

from dataclasses import dataclass

from segtrain.config.backbones import VitConfig
from segtrain.config.schema import SegmenterConfig
from segtrain.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """Pretrained weights of an encoder.

    Attributes:
        variant: Ti, S, B or L.
        patch_size: Side of a patch in pixels.
        distilled: Whether there is a distillation token.
        image_size: Side of the images of its training, in pixels.
        normalisation: Key of `NORMALISATIONS`.
    """

    variant: str
    patch_size: int
    distilled: bool = False
    image_size: int = 384
    normalisation: str = "vit"


def _deit(variant: str, image_size: int) -> Backbone:
    return Backbone(
        variant=variant,
        patch_size=16,
        distilled=True,
        image_size=image_size,
        normalisation="imagenet",
    )


# Name in timm 1.x -> what it is; the first of a kind is the paper's.
BACKBONES = {
    "vit_tiny_patch16_384.augreg_in21k_ft_in1k": Backbone(variant="Ti", patch_size=16),
    "vit_small_patch16_384.augreg_in21k_ft_in1k": Backbone(variant="S", patch_size=16),
    "vit_small_patch32_384.augreg_in21k_ft_in1k": Backbone(variant="S", patch_size=32),
    "vit_base_patch16_384.augreg_in21k_ft_in1k": Backbone(variant="B", patch_size=16),
    "vit_base_patch32_384.augreg_in21k_ft_in1k": Backbone(variant="B", patch_size=32),
    "vit_base_patch8_224.augreg_in21k_ft_in1k": Backbone(variant="B", patch_size=8, image_size=224),
    "vit_large_patch16_384.augreg_in21k_ft_in1k": Backbone(variant="L", patch_size=16),
    "vit_large_patch32_384.orig_in21k_ft_in1k": Backbone(variant="L", patch_size=32),
    "deit_base_distilled_patch16_384.fb_in1k": _deit("B", 384),
    "deit_base_distilled_patch16_224.fb_in1k": _deit("B", 224),
    "deit_small_distilled_patch16_224.fb_in1k": _deit("S", 224),
    "deit_tiny_distilled_patch16_224.fb_in1k": _deit("Ti", 224),
}


def backbone_of(config: SegmenterConfig | VitConfig) -> Backbone | None:
    """The table's entry for `pretrained`, where that is a name of the table.

    Args:
        config: The model.

    Returns:
        The entry; None for no weights, a file, or a name that only timm knows.

    Raises:
        UserError: If the entry is of another size, or of one of these names the tag is missing.
    """
    name = config.pretrained
    if name is None:
        return None
    if name not in BACKBONES:
        tagged = [known for known in BACKBONES if known.partition(".")[0] == name]
        if tagged:
            raise UserError(
                f"{_place(config)}.pretrained {name} names several weights; "
                f"write pretrained: {tagged[0]}"
            )
        return None
    entry = BACKBONES[name]
    wanted = {
        "variant": config.variant,
        "patch_size": config.patch_size,
        "distilled": config.distilled,
    }
    wrong = {key: getattr(entry, key) for key in wanted if getattr(entry, key) != wanted[key]}
    if wrong:
        fix = ", ".join(
            f"{key}: {str(value).lower() if value in (True, False) else value}"
            for key, value in wrong.items()
        )
        raise UserError(
            f"{_place(config)}.pretrained {name} does not fit the model; write {fix}, or take "
            f"pretrained: {_names(config) or 'null'}"
        )
    return entry


def _place(config: SegmenterConfig | VitConfig) -> str:
    return "model.backbone" if isinstance(config, VitConfig) else "model"


def _names(config: SegmenterConfig | VitConfig) -> str:
    """Names of the table for a model."""
    key = (config.variant, config.patch_size, config.distilled)
    return " or ".join(
        name for name, b in BACKBONES.items() if (b.variant, b.patch_size, b.distilled) == key
    )


def normalisation_of(config: SegmenterConfig | VitConfig) -> str:
    """The pixels that a model's encoder expects: of its weights, else of its kind.

    Args:
        config: The model.

    Returns:
        Key of `NORMALISATIONS`: that of the table's entry; for files, other names and random
        weights `imagenet` for encoders with a distillation token (DeiT), `vit` for the others.

    Raises:
        UserError: If the table's entry does not fit the model.
    """
    entry = backbone_of(config)
    if entry is not None:
        return entry.normalisation
    return "imagenet" if config.distilled else "vit"
