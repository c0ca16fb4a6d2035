"""Names of UN-EPT's released code in our words, and what its tensors tell of the model.

No weights were released; whoever trained with that code can bring theirs. Its backbones are timm's
DeiT, and MMSegmentation's ResNetV1c, whose stem is one list of nine layers.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from segtrain.errors import UserError
from segtrain.weights.describe import architecture_of
from segtrain.wording import first_of

MARK = "spatial_branch.convblock1.conv1.weight"
_HEADS = 8  # of the attention; no tensor tells
_DEPTHS = {6: 50, 23: 101}  # blocks of layer3 -> layers
# Theirs -> ours; the backbone's other names are ours as well.
_RENAMED = [
    (re.compile(old), new)
    for old, new in (
        (r"^backbone\.stem\.([01346])\.", r"backbone.conv1.\g<1>."),
        (r"^backbone\.stem\.7\.", "backbone.bn1."),
        (r"^cls\.", "head.classifier."),
        (r"^layers\.", "head.projections."),
        (r"^context_branch\.", "head.context."),
        (r"^query_embed\.", "head.query_embed."),
        (r"^spatial_branch\.convblock([123])\.conv1\.", r"head.spatial.block\g<1>.conv."),
        (r"^spatial_branch\.convblock([123])\.bn\.", r"head.spatial.block\g<1>.norm."),
        (r"^mask_head\.0\.", "head.boundary.0.conv."),
        (r"^mask_head\.1\.", "head.boundary.0.norm."),
        (r"^mask_head\.3\.", "head.boundary.1."),
        (r"^dir_head\.0\.", "head.direction.0.conv."),
        (r"^dir_head\.1\.", "head.direction.0.norm."),
        (r"^dir_head\.3\.", "head.direction.1."),
        (r"^(?=backbone\.)", ""),
    )
]


def is_released(names: Iterable[str]) -> bool:
    """Whether names are those of the released code.

    Args:
        names: Of the tensors of a file.

    Returns:
        The answer.
    """
    return MARK in set(names)


def from_released(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate the released names.

    Args:
        tensors: By the released names.

    Returns:
        By the names of our network.

    Raises:
        UserError: If a name is unknown.
    """
    renamed, unknown = {}, []
    for name, value in tensors.items():
        pattern = next((pair for pair in _RENAMED if pair[0].search(name)), None)
        if pattern is None:
            unknown.append(name)
        else:
            renamed[pattern[0].sub(pattern[1], name)] = value
    if unknown:
        raise UserError(f"UN-EPT has no counterpart of {first_of(unknown)}; take its model file")
    return renamed


def section_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The section `model` that released tensors belong to.

    Args:
        tensors: By our names.

    Returns:
        Keys and values; what the released code always does is among them.

    Raises:
        UserError: If a tensor that tells a size is missing.
    """
    try:
        return {"name": "network", "backbone": _backbone(tensors), "head": _head(tensors)}
    except KeyError as error:
        raise UserError(f"expected a tensor {error}; take the whole file") from None


def _head(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    context = "head.context"
    levels, channels = tensors[f"{context}.level_embed"].shape
    offsets = tensors[f"{context}.encoder.layers.0.self_attn.sampling_offsets.bias"]
    learned = "head.query_embed.weight" in tensors
    return {
        "name": "unept",
        "levels": levels,
        "channels": channels,
        "num_heads": _HEADS,
        "points": offsets.numel() // (2 * _HEADS * levels),
        "encoder_layers": _count(tensors, rf"{context}\.encoder\.layers"),
        "decoder_layers": _count(tensors, rf"{context}\.decoder\.layers"),
        "ffn_dim": tensors[f"{context}.encoder.layers.0.linear1.weight"].shape[0],
        "self_attention": "released",
        "spatial_widths": [tensors[f"head.spatial.block{n}.conv.weight"].shape[0] for n in (1, 2)],
        "last_relu": False,
        "query_embedding": "learned" if learned else "none",
        "boundary_classes": tensors["head.boundary.1.weight"].shape[0],
        "mask_rule": "logit",
        "refine_at_test": False,
    }


def _backbone(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    if "backbone.pos_embed" not in tensors:
        blocks = _count(tensors, r"backbone\.layer3")
        if blocks not in _DEPTHS:
            raise UserError(f"expected a ResNet-50 or 101, got {blocks} blocks in layer3")
        return {
            "name": "resnet",
            "depth": _DEPTHS[blocks],
            "stem": "deep32",
            "contract_dilation": True,
        }
    encoder = {name.replace("backbone.", "encoder.", 1): value for name, value in tensors.items()}
    sizes = architecture_of(encoder)
    # Of every third layer; heads are 64 wide, as in all of DeiT.
    blocks = [sizes.depth // 3, 2 * sizes.depth // 3, sizes.depth]
    return sizes.fields() | {"name": "vit", "blocks": blocks, "drop_path_rate": 0.0}


def _count(tensors: Mapping[str, Tensor], start: str) -> int:
    """Number of parts `start.0`, `start.1`, ..."""
    pattern = re.compile(rf"^{start}\.(\d+)\.")
    return len({found[1] for found in map(pattern.match, tensors) if found})
