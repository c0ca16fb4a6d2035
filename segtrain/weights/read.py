"""Reading weight files without running code that they may contain."""

import pickle
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
# What the readers raise on broken files, of all kinds.
_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    SafetensorError,
    struct.error,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)
_FEW_NUMBERS = 1 << 20  # of a tensor that may repeat what it stores


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


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Say of which file an error inside is.

    Args:
        path: The file.

    Yields:
        Nothing.

    Raises:
        UserError: That of the body, with the file before it.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


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
        if not isinstance(name, str):
            raise UserError(
                f"{path}: a tensor is named {name!r:.60}, expected a text; save the model's "
                "state_dict() alone"
            )
        if not isinstance(value, Tensor):
            raise UserError(
                f"{path}: {name} must be a tensor, got {type(value).__name__}; save the model's "
                "state_dict() alone"
            )
        if kind := _unusual(value):
            raise UserError(f"{path}: {name} is {kind}; save a dense tensor of numbers")
    prefix = "module."
    if all(name.startswith(prefix) for name in tensors):
        return {name.removeprefix(prefix): value for name, value in tensors.items()}
    return dict(tensors)


def _unusual(value: Tensor) -> str:
    """What keeps a tensor from being copied as it is; "" where nothing does."""
    if value.layout != torch.strided:
        return f"stored as {str(value.layout).removeprefix('torch.')}"
    if value.is_quantized or value.is_meta:
        return "quantized" if value.is_quantized else "without values"
    stored = value.untyped_storage().nbytes()
    # A file of a few bytes could else ask for any amount of memory.
    if value.numel() > _FEW_NUMBERS and value.numel() * value.element_size() > stored:
        return f"a view of {value.numel()} numbers over {stored} bytes"
    return ""
