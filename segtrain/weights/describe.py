"""What model a set of tensors belongs to, as keys of the section `model`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from segtrain.config.schema import SEGMENTER_VARIANTS
from segtrain.errors import UserError

_HEAD_DIM = 64  # of every published Segmenter
_LAYER = re.compile(r"^(?P<part>encoder|decoder)\.blocks\.(?P<number>\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The sizes that tensors tell.

    Attributes:
        embed_dim: Width.
        depth: Layers of the encoder.
        patch_size: Side of a patch in pixels.
        distilled: Whether there is a distillation token.
        num_positions: Rows of the position table behind the prefix tokens.
        decoder: `linear`, `mask` or "" for an encoder alone.
        decoder_layers: Of a mask transformer, else 0.
        num_classes: K, 0 for an encoder alone.
    """

    embed_dim: int
    depth: int
    patch_size: int
    distilled: bool
    num_positions: int
    decoder: str
    decoder_layers: int
    num_classes: int

    def fields(self, *, num_heads: int | None = None) -> dict[str, Any]:
        """Keys of the section `model`.

        Args:
            num_heads: Where it is known; no tensor tells it. Else heads are 64 wide.

        Returns:
            Key -> value, defaults left out where they say nothing.
        """
        heads = num_heads or max(self.embed_dim // _HEAD_DIM, 1)
        widths = (self.embed_dim, self.depth, heads)
        variant = next((v for v, known in SEGMENTER_VARIANTS.items() if known == widths), None)
        sizes = dict(zip(("embed_dim", "depth", "num_heads"), widths, strict=True))
        fields = {"name": "segmenter", **({"variant": variant} if variant else sizes)}
        fields |= {"patch_size": self.patch_size, "distilled": self.distilled}
        if self.decoder:
            fields["decoder"] = self.decoder
        if self.decoder == "mask":
            fields["decoder_layers"] = self.decoder_layers
        return fields

    def __str__(self) -> str:
        widths = f"width {self.embed_dim}, {self.depth} layers, patches of {self.patch_size}"
        known = self.fields().get("variant")
        encoder = f"{known}/{self.patch_size}" if known else "encoder"
        token = ", distillation token" if self.distilled else ""
        decoders = {
            "": "no decoder",
            "linear": f"linear decoder, {self.num_classes} classes",
            "mask": f"mask transformer of {self.decoder_layers} layers, {self.num_classes} classes",
        }
        return f"{encoder} ({widths}{token}); {decoders[self.decoder]}"


def architecture_of(tensors: Mapping[str, Tensor]) -> Architecture:
    """Read the sizes off the tensors.

    Args:
        tensors: In our layout (`layouts.to_segmenter`).

    Returns:
        The architecture.

    Raises:
        UserError: If a tensor that tells a size is missing or has no such shape.
    """
    patches = _tensor(tensors, "encoder.patch_embed.proj.weight", 4)
    positions = _tensor(tensors, "encoder.pos_embed", 3)
    layers = {"encoder": 0, "decoder": 0}
    for found in filter(None, map(_LAYER.match, tensors)):
        layers[found["part"]] = max(layers[found["part"]], int(found["number"]) + 1)
    distilled = "encoder.dist_token" in tensors
    decoder, num_classes = _decoder(tensors)
    return Architecture(
        embed_dim=patches.shape[0],
        depth=layers["encoder"],
        patch_size=patches.shape[-1],
        distilled=distilled,
        num_positions=positions.shape[1] - 1 - distilled,
        decoder=decoder,
        decoder_layers=layers["decoder"],
        num_classes=num_classes,
    )


def _decoder(tensors: Mapping[str, Tensor]) -> tuple[str, int]:
    """Kind of decoder and number of classes."""
    if "decoder.head.weight" in tensors:
        return "linear", tensors["decoder.head.weight"].shape[0]
    if "decoder.cls_emb" in tensors:
        return "mask", _tensor(tensors, "decoder.cls_emb", 3).shape[1]
    return "", 0


def _tensor(tensors: Mapping[str, Tensor], name: str, dims: int) -> Tensor:
    if name not in tensors or tensors[name].dim() != dims:
        shape = tuple(tensors[name].shape) if name in tensors else "nothing"
        raise UserError(
            f"expected a tensor {name} of {dims} dimensions, got {shape}; take the whole file"
        )
    return tensors[name]
