"""Reading checkpoint files of all formats that Detectron2 takes, without running their code."""

import os
import pickle
import pickletools
import re
import struct
import tarfile
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from d2ctx.errors import UserError

# How torch names what it refuses, and what else it finds wrong.
_TORCH_REFUSED = re.compile(r"GLOBAL (?P<name>[\w.]+)")
_TORCH_REASON = re.compile(r"WeightsUnpickler error:\s*(?P<reason>[^\n]+)")


def _numpy_parts() -> dict[str, Any]:
    """Everything that a pickled numpy array or scalar names, under the old and new module paths."""
    array, scalar = np.zeros(1), np.float64(0)
    parts = {
        "multiarray._reconstruct": array.__reduce__()[0],
        "multiarray.scalar": scalar.__reduce__()[0],
        "numeric._frombuffer": array.__reduce_ex__(5)[0],
    }
    named = {f"numpy.{core}.{name}": p for core in ("core", "_core") for name, p in parts.items()}
    return {**named, "numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype}


def _latin1(text: str, encoding: str) -> bytes:
    """What `_codecs.encode` does in pickled arrays; other codecs are refused."""
    if encoding not in {"latin1", "latin-1"}:
        raise pickle.UnpicklingError(f"codec {encoding}")
    return text.encode("latin1")


def _bytearray(*parts: Any) -> bytearray:
    """What pickles make of bytes; a number would ask for so many zeros."""
    if parts and not isinstance(parts[0], bytes | str):
        raise pickle.UnpicklingError("bytearray of no bytes")
    return bytearray(*parts)


_PICKLE_GLOBALS: dict[str, Any] = {
    **_numpy_parts(),
    "_codecs.encode": _latin1,
    "collections.OrderedDict": OrderedDict,
    **{f"{module}.set": set for module in ("builtins", "__builtin__")},
    **{f"{module}.bytearray": _bytearray for module in ("builtins", "__builtin__")},
}


# torch wants every dtype's own class too.
_TORCH_GLOBALS = [(part, name) for name, part in _numpy_parts().items()] + [
    value for value in vars(np.dtypes).values() if isinstance(value, type)
]
# What the readers raise on broken files, of all kinds.
_READ_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    SafetensorError,
    struct.error,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)
_FEW_NUMBERS = 1 << 20  # of a tensor that may repeat what it stores


class _RefusedGlobalError(pickle.UnpicklingError):
    """A pickle names something that is neither an array nor a plain container."""


class _PlainUnpickler(pickle.Unpickler):
    """Admits numpy arrays and plain containers, nothing that could be called for its effects."""

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in _PICKLE_GLOBALS:
            raise _RefusedGlobalError(full)
        return _PICKLE_GLOBALS[full]


def read_checkpoint(path: str) -> dict[str, Any]:
    """Read a local checkpoint into the form that Detectron2's checkpointer works on.

    Args:
        path: .safetensors, .pth, .pt, .pyth (pycls) or .pkl (model zoo, Detectron 1).

    Returns:
        At least "model" (name -> tensor or array); with "__author__" and "matching_heuristics"
        where the format calls for name matching; and whatever else the file holds.

    Raises:
        UserError: If the file is unreadable, names code, or holds no tensors.
    """
    suffix = Path(path).suffix
    if suffix == ".safetensors":
        checkpoint = {"model": _guarded(path, safetensors.torch.load_file)}
    elif suffix == ".pkl":
        checkpoint = _from_zoo(_guarded(path, _read_pickle))
    else:
        checkpoint = _from_torch(_guarded(path, _read_torch), pycls=suffix == ".pyth")
    _check_tensors(path, checkpoint["model"])
    return checkpoint


def _read_pickle(path: str) -> dict[str, Any]:
    with open(path, "rb") as file:
        _check_memo(file)
        return _PlainUnpickler(file, encoding="latin1").load()


def _check_memo(file: BinaryIO) -> None:
    """Refuse numbers of remembered objects for which the unpickler would take any memory."""
    most = os.fstat(file.fileno()).st_size
    for code, number, _ in pickletools.genops(file):
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and number > most:
            raise ValueError(f"it remembers more objects than it has bytes: {number}")
    file.seek(0)


def _read_torch(path: str) -> dict[str, Any]:
    with torch.serialization.safe_globals(_TORCH_GLOBALS):
        return torch.load(path, map_location="cpu", weights_only=True)


def _guarded(path: str, read: Callable[[str], Any]) -> dict[str, Any]:
    """Read, with everything that a broken or unsafe file can raise turned into a user error."""
    try:
        content = read(path)
    except pickle.UnpicklingError as error:
        if name := _refused_name(error):
            raise UserError(
                f"{path} names {name}, which could run code: such files are refused; convert it "
                "to .safetensors where you trust it"
            ) from error
        raise UserError(_unreadable(path, error)) from error
    except _READ_ERRORS as error:
        raise UserError(_unreadable(path, error)) from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} must hold tensors by name, got {type(content).__name__}")
    return dict(content)


def _refused_name(error: pickle.UnpicklingError) -> str | None:
    if isinstance(error, _RefusedGlobalError):
        return str(error)
    found = _TORCH_REFUSED.search(str(error))
    return found["name"] if found else None


def _unreadable(path: str, error: Exception) -> str:
    found = _TORCH_REASON.search(str(error))
    reason = found["reason"] if found else str(error).partition("\n")[0].partition(". ")[0]
    if " " not in reason:  # a lone number or nothing: the parser stumbled over another format
        reason = "the content is not of that format"
    return f"{path} is no readable weight file ({reason}); download or copy it again"


def _from_zoo(content: dict[str, Any]) -> dict[str, Any]:
    """A Detectron2 zoo file as it is; anything else is taken for Caffe2, as Detectron2 does."""
    if "model" in content and "__author__" in content:
        return content
    blobs = content.get("blobs", content)
    if isinstance(blobs, Mapping):
        blobs = {k: v for k, v in blobs.items() if not str(k).endswith("_momentum")}
    return {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True}


def _from_torch(content: dict[str, Any], *, pycls: bool) -> dict[str, Any]:
    if pycls and isinstance(content.get("model_state"), Mapping):
        model = {k: v for k, v in content["model_state"].items() if not _is_counter(k)}
        return {"model": model, "__author__": "pycls", "matching_heuristics": True}
    if "model" in content:
        return content
    return {"model": content.get("state_dict", content)}


def _is_counter(name: object) -> bool:
    return str(name).endswith("num_batches_tracked")


def _check_tensors(path: str, model: Any) -> None:
    if not isinstance(model, Mapping) or not model:
        raise UserError(
            f"{path} must hold tensors by name, got {type(model).__name__} {model!r:.40}"
        )
    for name, value in model.items():
        if not isinstance(name, str):
            raise UserError(
                f"{path}: a tensor is named {name!r:.60}, expected a text; save the model's "
                "state_dict() alone"
            )
        if not isinstance(value, np.ndarray | Tensor):
            raise UserError(
                f"{path}: {name} must be a tensor, got {type(value).__name__}; save the model's "
                "state_dict() alone"
            )
        if kind := _unusual(value):
            raise UserError(f"{path}: {name} is {kind}; save a dense tensor of numbers")


def _unusual(value: np.ndarray | Tensor) -> str:
    """What keeps a tensor from being copied as it is; "" where nothing does."""
    if isinstance(value, np.ndarray):
        return "" if value.dtype.kind in "biufc" else f"an array of {value.dtype}"
    if value.layout != torch.strided:
        return f"stored as {str(value.layout).removeprefix('torch.')}"
    if value.is_quantized or value.is_meta:
        return "quantized" if value.is_quantized else "without values"
    stored = value.untyped_storage().nbytes()
    # A file of a few bytes could else ask for any amount of memory.
    if value.numel() > _FEW_NUMBERS and value.numel() * value.element_size() > stored:
        return f"a view of {value.numel()} numbers over {stored} bytes"
    return ""
