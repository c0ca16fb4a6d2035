"""What a weight file holds, and how it fits the model of a configuration."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segtrain.config.load import load_config
from segtrain.errors import UserError
from segtrain.models import build_model
from segtrain.models.network import Network
from segtrain.weights.convert import Converted, understand
from segtrain.weights.fit import compare
from segtrain.weights.layouts import TIMM
from segtrain.weights.network import NetworkFile, is_network, understand_network
from segtrain.weights.own import as_yaml
from segtrain.weights.read import WeightFile, read_weights
from segtrain.wording import first_of, plural

_FEW = 4  # tensors of a part whose shapes are listed


def summary(path: Path) -> dict[str, Any]:
    """What a file holds.

    Args:
        path: The file.

    Returns:
        Texts: layout, model, tensors, left_out (if anything is), config; of a network its parts.

    Raises:
        UserError: If it cannot be read, or is of no known layout.
    """
    file = read_weights(path)
    if is_network(file.tensors):
        return _network_summary(file)
    found = understand(file)
    facts = {
        "file": str(path),
        "layout": found.layout,
        "model": str(found.architecture),
        "tensors": _numbers(file.tensors),
    }
    if found.left_out:
        facts["left out"] = f"{first_of(found.left_out)} (ImageNet classifiers)"
    return facts | {"config": found.yaml()}


def _numbers(tensors: Mapping[str, Tensor]) -> str:
    types = Counter(str(value.dtype).removeprefix("torch.") for value in tensors.values())
    kinds = ", ".join(f"{count} {name}" for name, count in types.most_common())
    numbers = sum(value.numel() for value in tensors.values())
    return f"{plural(len(tensors), 'tensor')} ({kinds}), {numbers:,} numbers"


def _network_summary(file: WeightFile) -> dict[str, Any]:
    found = understand_network(file)
    facts = {
        "file": str(file.path),
        "layout": found.layout,
        "model": f"backbone and head, {plural(found.num_classes, 'class')}",
        "tensors": _numbers(file.tensors),
        "parts": _parts(found.tensors),
    }
    return facts | ({"config": as_yaml(found.config)} if found.config else {})


def _parts(tensors: Mapping[str, Tensor]) -> str:
    """A line per part: numbers, and shapes as far as there are few."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        words = name.split(".")
        parts.setdefault(".".join(words[:2]), {})[".".join(words[2:])] = value
    width = max(map(len, parts))
    lines = []
    for part, values in parts.items():
        shapes = [f"{name} {list(value.shape)}".strip() for name, value in sorted(values.items())]
        listed = ", ".join(shapes) if len(shapes) <= _FEW else plural(len(shapes), "tensor")
        numbers = sum(value.numel() for value in values.values())
        lines.append(f"{part:{width}}  {numbers:13,}  {listed}")
    return "\n".join(lines)


def against(path: Path, config_file: str) -> str:
    """How a file fits the model of a configuration; nothing is loaded.

    Args:
        path: The file.
        config_file: The configuration.

    Returns:
        The table of parts, and a verdict.

    Raises:
        UserError: If the file or the configuration is wrong.
    """
    file, config = read_weights(path), load_config(config_file)
    found: NetworkFile | Converted
    if is_network(file.tensors):
        found, parts = understand_network(file), ("",)
    else:
        found = understand(file)
        parts = ("encoder.",) if found.layout == TIMM else ("encoder.", "decoder.")
    with torch.device("meta"):
        model = build_model(config.model, max(found.num_classes, 1), image_size=config.data.crop)
    if isinstance(model, Network):
        parts = ("",)
    try:
        fit = compare(model, found.tensors, source=str(path), parts=parts, grids=found.grids)
    except UserError as error:
        return str(error)
    verdict = "fits" if fit.complete else "does not fit"
    lines = [fit.table(), f"{verdict} the model of {config_file}", *fit.notes()]
    return "\n".join(lines)
