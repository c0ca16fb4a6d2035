"""Weight files that run code where they are read carelessly, and files that are broken."""

import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".tar")


class Call:
    """Pickled, it calls a function when it is read."""

    def __init__(self, function: Callable, *arguments: object):
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable, tuple]:
        return self.function, self.arguments


def calls(sentinel: Path) -> dict[str, Call]:
    """Ways to write a file while another is read."""
    write = f"open({str(sentinel)!r}, 'w').close()"
    return {
        "eval": Call(eval, write),
        "exec": Call(exec, write),
        "open": Call(open, str(sentinel), "w"),
        "system": Call(__import__("os").system, f"touch {sentinel}"),
        "popen": Call(__import__("subprocess").Popen, ["touch", str(sentinel)]),
        "touch": Call(Path.touch, sentinel),
        "runpy": Call(__import__("runpy").run_path, str(sentinel)),
        "load": Call(torch.load, str(sentinel)),
        "getattr": Call(getattr, sentinel, "touch"),
    }


def pickles(content: Any) -> dict[str, bytes]:
    """The ways in which torch and others write an object."""
    found = {f"protocol {p}": pickle.dumps(content, protocol=p) for p in (0, 2, 4, 5)}
    for name, zipped in (("zip", True), ("legacy", False)):
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
        found[name] = buffer.getvalue()
    found["tar"] = in_tar({"pickle": found["protocol 2"], "storages": b"", "tensors": b""})
    return found


def nested(call: Call) -> dict[str, Any]:
    """Where in a file the call can stand."""
    tensor = torch.ones(2)
    return {
        "alone": call,
        "tensor": {"weight": call},
        "beside": {"model": {"weight": tensor}, "optimizer": call},
        "below": {"state_dict": OrderedDict(weight=tensor, bias=call)},
        "list": [tensor, call],
    }


def in_tar(files: dict[str, bytes], *, links: dict[str, str] | None = None) -> bytes:
    """A tar archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        for name, target in (links or {}).items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            archive.addfile(entry)
    return buffer.getvalue()


def in_zip(files: dict[str, bytes]) -> bytes:
    """A zip archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def saved(content: Any, **options: Any) -> bytes:
    """What torch writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def safetensors_of(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A .safetensors with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list, begin: int, end: int, kind: str = "F32") -> dict[str, Any]:
    """A tensor in the header of a .safetensors."""
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


BROKEN_SAFETENSORS = {
    "nothing": b"",
    "short": b"\x08\0\0",
    "no header": struct.pack("<Q", 0),
    "huge header": safetensors_of({}, length=2**63),
    "long header": safetensors_of({}, length=10**9),
    "no json": safetensors_of(b"{{{{"),
    "a list": safetensors_of([]),
    "empty": safetensors_of({}),
    "no data": safetensors_of({"a": entry([2], 0, 8)}),
    "too much data": safetensors_of({"a": entry([2], 0, 8)}, b"\0" * 99),
    "wrong shape": safetensors_of({"a": entry([3], 0, 8)}, b"\0" * 8),
    "huge shape": safetensors_of({"a": entry([2**40, 2**40], 0, 8)}, b"\0" * 8),
    "negative shape": safetensors_of({"a": entry([-2], 0, 8)}, b"\0" * 8),
    "backwards": safetensors_of({"a": entry([2], 8, 0)}, b"\0" * 8),
    "overlapping": safetensors_of({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"\0" * 12),
    "a hole": safetensors_of({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"\0" * 12),
    "unknown type": safetensors_of({"a": entry([2], 0, 8, "F99")}, b"\0" * 8),
    "no fields": safetensors_of({"a": {}}),
    "deep": safetensors_of(b'{"a":' * 50_000),
    "fields of numbers": safetensors_of({"__metadata__": {"a": 1}}),
    "a pickle": pickle.dumps({"a": 1}),
}


def broken_torch(sentinel: Path) -> dict[str, bytes]:
    """Files of torch's endings that hold no state dict."""
    whole = saved({"weight": torch.ones(20)})
    outside = sentinel.name
    return {
        "nothing": b"",
        "zero": b"\0" * 100,
        "text": b"weights\n",
        "page": b"<!DOCTYPE html><html>404</html>",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "cut": whole[: len(whole) // 2],
        "zip of nothing": in_zip({}),
        "zip of another": in_zip({"a.txt": b"a"}),
        "zip slip": in_zip({f"../../{outside}": b"x", "archive/data.pkl": b"N."}),
        "zip of a bad pickle": in_zip(
            {"archive/data.pkl": b"\x80\x02}q\0(X", "archive/version": b"3"}
        ),
        "tar of nothing": in_tar({}),
        "tar slip": in_tar({f"../../{outside}": b"x", f"/tmp/{outside}": b"x"}),
        "tar of links": in_tar({}, links={"storages": "/etc", "pickle": str(sentinel)}),
        "none": saved(None),
        "number": saved(5),
        "tensor": saved(torch.ones(2)),
        "list": saved([torch.ones(2)]),
        "empty": saved({}),
        "empty nest": saved({"model": {}}),
        "nest of a list": saved({"model": [1]}),
        "number names": saved({1: torch.ones(2)}),
        "tuple names": saved({("a", "b"): torch.ones(2)}),
        "no names": saved({None: torch.ones(2)}),
        "numbers": saved({"a": 1.5}),
        "texts": saved({"a": "b"}),
        "nested": saved({"a": {"b": torch.ones(2)}}),
        "sparse": saved({"a": torch.ones(2).to_sparse()}),
        "meta": saved({"a": torch.ones(2, device="meta")}),
        "view": saved({"a": torch.zeros(1).expand(10**12)}),
        "itself": saved(_circle()),
    }


def _circle() -> dict[str, Any]:
    found: dict[str, Any] = {}
    found["model"] = found
    return found


def broken_pickles() -> dict[str, bytes]:
    """What a .pkl of Detectron2's zoo must not be."""
    return {
        "nothing": b"",
        "cut": pickle.dumps({"a": np.ones(100)})[:200],
        "number": pickle.dumps(5),
        "list": pickle.dumps([1]),
        "empty": pickle.dumps({}),
        "blobs of a number": pickle.dumps({"blobs": 5}),
        "model of a list": pickle.dumps({"model": [1], "__author__": "x"}),
        "number names": pickle.dumps({1: np.ones(2)}),
        "objects": pickle.dumps({"a": np.array([None, {}], dtype=object)}),
        "text": pickle.dumps({"a": np.array(["x"])}),
        "records": pickle.dumps({"a": np.zeros(1, [("x", int)])}),
        "dates": pickle.dumps({"a": np.zeros(1, "M8[s]")}),
        "memo": b"\x80\x02}r\xff\xff\xff\x7f.",
        "old memo": b"(dp99999999999\n.",
        "zeros": b"\x80\x04cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x01\x85R.",
        "array": b"\x80\x02cnumpy\nndarray\n\x8a\x06\0\0\0\0\0\x01\x85\x85R.",
        "marks": b"(" * 10_000 + b".",
        "stack": b"0" * 100,
        "long": b"\x80\x02\x8b\xff\xff\xff\x7f.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent": b"\x80\x02X\x01\0\0\0aQ.",
    }
