"""Weights of networks of backbone and head: understood, loaded whole, or a backbone alone."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from segtrain.errors import UserError
from segtrain.models.network import Network
from segtrain.weights.fit import Fit, load_into
from segtrain.weights.grids import FIELD, Grid, grids_of_text, square_grid
from segtrain.weights.own import check_target, stored_config, write_weights
from segtrain.weights.read import WeightFile, named, read_weights
from segtrain.weights.timm_hub import is_file, weights_of_timm
from segtrain.weights.unept import from_released, is_released, section_of
from segtrain.wording import plural

LAYOUT, UNEPT = "network", "unept"
_BACKBONE = "backbone."
_POSITIONS = f"{_BACKBONE}pos_embed"
_CLASSIFIER = "head.classifier.weight"
# ImageNet classifiers, which no map depends on.
_CLASSIFIERS = re.compile(r"^(fc|head|head_dist|norm|fc_norm|pre_logits\.\w+)\.(weight|bias)$")


@dataclass(frozen=True, kw_only=True)
class NetworkFile:
    """What a file of a network holds, in our words.

    Attributes:
        layout: That of the file, `network` (ours) or `unept` (its released code).
        tensors: By our names.
        grids: Grids of tables, as far as they are known.
        config: Sections of a configuration, empty where the file tells none.
    """

    layout: str
    tensors: Mapping[str, Tensor]
    grids: Mapping[str, Grid]
    config: Mapping[str, Mapping[str, Any]]

    @property
    def num_classes(self) -> int:
        """K, 1 where no tensor tells."""
        classifier = self.tensors.get(_CLASSIFIER)
        return 1 if classifier is None else classifier.shape[0]


def is_network(names: Iterable[str]) -> bool:
    """Whether names are those of a network, ours or UN-EPT's as released.

    Args:
        names: Of the tensors of a file.

    Returns:
        The answer.
    """
    known = set(names)
    parts = {name.partition(".")[0] for name in known}
    return is_released(known) or {"backbone", "head"} <= parts


def understand_network(file: WeightFile) -> NetworkFile:
    """Find out what the file of a network holds.

    Args:
        file: What was read.

    Returns:
        What it holds.

    Raises:
        UserError: If it is UN-EPT's, and not a whole one.
    """
    if not is_released(file.tensors):
        grids, config = grids_of_text(file.metadata), stored_config(file)
        return NetworkFile(layout=LAYOUT, tensors=file.tensors, grids=grids, config=config)
    with named(file.path):
        tensors = from_released(file.tensors)
        model = section_of(tensors)
    return NetworkFile(
        layout=UNEPT,
        tensors=tensors,
        grids=_squares(tensors, {_POSITIONS: _prefix(tensors), "head.query_embed.weight": 0}),
        config={"model": model, "data": {"normalisation": "imagenet"}},
    )


def convert_network(file: WeightFile, target: Path) -> NetworkFile:
    """Write weights of a network under our names, with what is known of grids and configuration.

    Args:
        file: Of a network.
        target: A .safetensors; its folder is made, an existing file is replaced.

    Returns:
        What was found.

    Raises:
        UserError: If the file cannot be translated, or `target` is no .safetensors.
    """
    check_target(target)
    found = understand_network(file)
    metadata = {"names": LAYOUT, FIELD: json.dumps(dict(found.grids))}
    if found.config:
        metadata["config"] = json.dumps(found.config)
    write_weights(target, found.tensors, metadata)
    return found


def load_network(model: Network, path: str | Path, *, new_classes: bool = False) -> Fit:
    """Load a whole network.

    Args:
        model: Where to.
        path: A file of ours, or of UN-EPT's released code.
        new_classes: Whether parameters of another number of classes may start at random.

    Returns:
        What was loaded.

    Raises:
        UserError: If the file cannot be read, or does not fit; the model is untouched then.
    """
    found = understand_network(read_weights(path))
    return load_into(
        model,
        found.tensors,
        source=str(path),
        parts=("",),
        grids=found.grids,
        new_classes=new_classes,
    )


def load_backbone(model: Network, name: str) -> list[str]:
    """Load a pretrained backbone, all of its tensors: another stem is refused.

    Args:
        model: Where to.
        name: A file, or a name that timm knows.

    Returns:
        What was done, a line each.

    Raises:
        UserError: If the weights cannot be had, or do not fit.
    """
    if is_file(name):
        file = read_weights(name)
    else:
        file = WeightFile(path=Path(name), tensors=weights_of_timm(name))
    renamed = _renamed(file.tensors, name, model.backbone)
    grids = _squares(renamed, {_POSITIONS: _prefix(renamed)}) | grids_of_text(file.metadata)
    fit = load_into(model, renamed, source=name, parts=(_BACKBONE,), grids=grids)
    return [f"backbone of {name}: {plural(len(fit.matched), 'tensor')}", *fit.notes()]


def _renamed(tensors: Mapping[str, Tensor], source: str, backbone: nn.Module) -> dict[str, Tensor]:
    """Of a network of ours its backbone, else all but the classifier and what is cut off."""
    own = {name: value for name, value in tensors.items() if name.startswith(_BACKBONE)}
    if own:
        return own
    unused = getattr(backbone, "unused", frozenset[str]())
    kept = {n: v for n, v in tensors.items() if n not in unused and not _CLASSIFIERS.match(n)}
    if not kept:
        raise UserError(f"{source} holds no weights of a backbone; take another file")
    prefix = _BACKBONE + getattr(backbone, "weights_prefix", "")
    return {f"{prefix}{name}": value for name, value in kept.items()}


def _prefix(tensors: Mapping[str, Tensor]) -> int:
    return 2 if f"{_BACKBONE}dist_token" in tensors else 1


def _squares(tensors: Mapping[str, Tensor], tables: Mapping[str, int]) -> dict[str, Grid]:
    """Grids of tables that were trained on squares, by the number of rows before the grid."""
    found = {
        name: square_grid(tensors[name].shape[-2] - prefix)
        for name, prefix in tables.items()
        if name in tensors
    }
    return {name: grid for name, grid in found.items() if grid is not None}
