"""Weights of the authors, of MMSegmentation and of timm into a file of ours, and back."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from segtrain.errors import UserError
from segtrain.weights.describe import Architecture, architecture_of
from segtrain.weights.fit import POSITIONS
from segtrain.weights.grids import Grid, square_grid
from segtrain.weights.layouts import (
    MMSEGMENTATION,
    SEGMENTER,
    TIMM,
    classifiers,
    from_segmenter,
    layout_of,
    to_segmenter,
)
from segtrain.weights.official import NAME as VARIANT_NAME
from segtrain.weights.official import Variant, read_variant
from segtrain.weights.own import SUFFIX, as_yaml, check_target, stored_config, write_weights
from segtrain.weights.read import WeightFile, named, read_weights

# What MMSegmentation computes otherwise; its decoder has the eps of a plain LayerNorm.
_MMSEGMENTATION_MODEL = {
    "layer_norm_eps": 1e-6,
    "decoder_layer_norm_eps": 1e-5,
    "pos_embed_resize": "bicubic",
    "decoder_dropout": 0.0,
    "decoder_drop_path": 0.1,
}
_LONGEST = 6  # digits of a side of a grid
_ONLY_MASK = ("decoder_layer_norm_eps", "decoder_dropout", "decoder_drop_path")
_OFFICIAL_MODEL = {"layer_norm_eps": 1e-5, "pos_embed_resize": "bilinear"}


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What a file holds, in our words.

    Attributes:
        layout: That of the file, one of `layouts.LAYOUTS`.
        architecture: Sizes.
        tensors: In our layout.
        grid: Grid (h, w) of the position table, None where it is unknown.
        config: Sections of a configuration with the keys that the weights ask for.
        left_out: Tensors of the file that have no place here (ImageNet classifiers).
    """

    layout: str
    architecture: Architecture
    tensors: Mapping[str, Tensor]
    grid: Grid | None
    config: Mapping[str, Mapping[str, Any]]
    left_out: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """K, 0 for an encoder alone."""
        return self.architecture.num_classes

    @property
    def grids(self) -> dict[str, Grid]:
        """Grids of tables, as `fit.load_into` takes them."""
        return {POSITIONS: self.grid} if self.grid else {}

    def yaml(self) -> str:
        """The sections as YAML."""
        return as_yaml(self.config)


def understand(file: WeightFile, *, variant: Path | None = None) -> Converted:
    """Find out what a weight file holds.

    Args:
        file: What was read.
        variant: The authors' `variant.yml`; None takes the one beside a `.pth`, if there is one.

    Returns:
        What it holds.

    Raises:
        UserError: If the layout is unknown, or `variant.yml` contradicts the tensors.
    """
    with named(file.path):
        layout = layout_of(file.tensors)
        tensors = to_segmenter(file.tensors)
        found = architecture_of(tensors)
    said = _said(file, variant)
    if said and said.num_classes != found.num_classes:
        raise UserError(
            f"{VARIANT_NAME} says {said.num_classes} classes, the tensors have "
            f"{found.num_classes}; take the {VARIANT_NAME} of this checkpoint"
        )
    return Converted(
        layout=layout,
        architecture=found,
        tensors=tensors,
        grid=_grid(file, layout, found, official=said is not None),
        config=_config(file, layout, found, said),
        left_out=classifiers(file.tensors),
    )


def convert(
    source: Path | WeightFile, target: Path, *, layout: str = SEGMENTER, variant: Path | None = None
) -> Converted:
    """Write weights in another layout; our own carries grid and configuration as text fields.

    Args:
        source: Weights of the authors, MMSegmentation, timm or ours; a file, or what it holds.
        target: A .safetensors; its folder is made, an existing file is replaced.
        layout: Names to write, one of `layouts.LAYOUTS`.
        variant: As in `understand`.

    Returns:
        What was found.

    Raises:
        UserError: If the file cannot be read or translated, or `target` is no .safetensors.
    """
    check_target(target)
    file = source if isinstance(source, WeightFile) else read_weights(source)
    found = understand(file, variant=variant)
    metadata = {"names": layout}
    if layout == SEGMENTER:
        metadata["config"] = json.dumps(found.config)
        if found.grid:
            metadata["grid"] = "x".join(map(str, found.grid))
    tensors = from_segmenter(found.tensors, layout)
    write_weights(target, tensors, metadata)
    return found


def _said(file: WeightFile, variant: Path | None) -> Variant | None:
    beside = file.path.with_name(VARIANT_NAME)
    if variant is None and file.path.suffix != SUFFIX and beside.is_file():
        variant = beside
    return read_variant(variant) if variant else None


def _grid(file: WeightFile, layout: str, found: Architecture, *, official: bool) -> Grid | None:
    """As the file says; the authors and timm train on squares, others may not."""
    height, _, width = file.metadata.get("grid", "").partition("x")
    if max(len(height), len(width)) < _LONGEST and height.isdecimal() and width.isdecimal():
        return int(height), int(width)
    return square_grid(found.num_positions) if official or layout == TIMM else None


def _config(
    file: WeightFile, layout: str, found: Architecture, said: Variant | None
) -> dict[str, dict[str, Any]]:
    if "config" in file.metadata:
        return stored_config(file)
    model = found.fields(num_heads=said.num_heads if said else None)
    if layout == MMSEGMENTATION:
        masked = found.decoder == "mask"
        model |= {k: v for k, v in _MMSEGMENTATION_MODEL.items() if masked or k not in _ONLY_MASK}
    normalisation = "imagenet" if found.distilled else "vit"
    if not said:
        return {"model": model, "data": {"normalisation": normalisation}}
    model |= _OFFICIAL_MODEL | said.model
    return {"model": model, "data": dict(said.data), "eval": dict(said.eval)}
