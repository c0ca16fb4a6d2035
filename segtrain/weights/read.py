"""Reading weight files without running code that they may contain."""

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from segtrain.errors import UserError

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar")
# Where other programs nest the tensors.
_NESTS = ("model", "state_dict", "model_state_dict", "model_state")
_REFUSED = re.compile(r"GLOBAL (?P<name>[\w.]+)|Unsupported (?:global|class) (?P<other>[\w.]+)")
_ERRORS = (
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    SafetensorError,
)


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """What a weight file holds.

    Attributes:
        path: The file.
        tensors: Name -> tensor on the CPU.
        extra: What else lies beside the tensors (of a `.pth`).
        metadata: Text fields (of a `.safetensors`).
    """

    path: Path
    tensors: dict[str, Tensor]
    extra: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


def read_weights(path: str | Path) -> WeightFile:
    """Read a weight file.

    Args:
        path: .safetensors, .pth, .pt, .bin or .tar.

    Returns:
        Its tensors, unwrapped from `model` or `state_dict` and from a common prefix `module.`.

    Raises:
        UserError: If the file is absent, unreadable, names code, or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights {path} do not exist; mend the path")
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"{path} is no weight file that can be read; expected one of {', '.join(SUFFIXES)}"
        )
    if path.suffix == ".safetensors":
        tensors, metadata = _guarded(path, _read_safetensors)
        return WeightFile(path=path, tensors=_checked(path, tensors), metadata=metadata)
    content = _guarded(path, _read_torch)
    if not isinstance(content, Mapping):
        raise UserError(f"{path} must hold tensors by name, got {type(content).__name__}")
    nest = next((n for n in _NESTS if isinstance(content.get(n), Mapping)), None)
    tensors = content if nest is None else content[nest]
    extra = {} if nest is None else {k: v for k, v in content.items() if k != nest}
    return WeightFile(path=path, tensors=_checked(path, tensors), extra=extra)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def _read_torch(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _guarded(path: Path, read: Any) -> Any:
    """Read, with all that a broken or unsafe file can raise turned into a user error."""
    try:
        return read(path)
    except pickle.UnpicklingError as error:
        if found := _REFUSED.search(str(error)):
            name = found["name"] or found["other"]
            raise UserError(
                f"{path} names {name}, which could run code: such files are refused; where you "
                "trust it, save its state_dict alone as .safetensors"
            ) from error
        raise UserError(_unreadable(path)) from error
    except _ERRORS as error:
        raise UserError(_unreadable(path)) from error


def _unreadable(path: Path) -> str:
    return f"{path} is no readable weight file, or not a whole one; download or copy it again"


def _checked(path: Path, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    if not tensors:
        raise UserError(f"{path} holds no tensors; take the file with the weights")
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"{path}: {name} must be a tensor, got {type(value).__name__}; save the model's "
                "state_dict() alone"
            )
    prefix = "module."
    if all(str(name).startswith(prefix) for name in tensors):
        return {name.removeprefix(prefix): value for name, value in tensors.items()}
    return dict(tensors)
