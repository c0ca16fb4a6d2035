"""Detectron2's batches as tensors and plain types, which can be read back without running code."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from detectron2.structures import (
    BitMasks,
    Boxes,
    Instances,
    Keypoints,
    PolygonMasks,
    RotatedBoxes,
)
from torch import Tensor

_KIND = "__kind__"
_OF_TENSOR: dict[str, Callable[[Tensor], Any]] = {
    "Boxes": Boxes,
    "RotatedBoxes": RotatedBoxes,
    "BitMasks": BitMasks,
    "Keypoints": Keypoints,
}


def to_plain(value: Any) -> Any:
    """Say a value in tensors, text, numbers, lists and dicts.

    Args:
        value: A batch or a part of one.

    Returns:
        Copies on the CPU; what is of another class is named, and lost.
    """
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, np.ndarray) and value.dtype != object:
        return {_KIND: "ndarray", "values": torch.from_numpy(np.array(value))}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Instances):
        fields = {name: to_plain(field) for name, field in value.get_fields().items()}
        return {_KIND: kind, "size": list(value.image_size), "fields": fields}
    if isinstance(value, PolygonMasks):
        return {_KIND: kind, "polygons": to_plain(value.polygons)}
    if kind in _OF_TENSOR:
        return {_KIND: kind, "values": to_plain(value.tensor)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return {_KIND: "lost", "class": kind}


def from_plain(value: Any) -> Any:
    """The value that `to_plain` was given.

    Args:
        value: Of `to_plain`.

    Returns:
        The batch on the CPU; tuples are lists now, and None stands for what was lost.
    """
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_KIND)
    if kind is None:
        return {key: from_plain(item) for key, item in value.items()}
    if kind == "ndarray":
        return value["values"].numpy()
    if kind == "Instances":
        fields = {name: from_plain(field) for name, field in value["fields"].items()}
        return Instances(tuple(value["size"]), **fields)
    if kind == "PolygonMasks":
        return PolygonMasks(from_plain(value["polygons"]))
    return _OF_TENSOR[kind](value["values"]) if kind in _OF_TENSOR else None
