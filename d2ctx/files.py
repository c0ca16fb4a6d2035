"""Writing files whole or not at all, and the user's cache folder."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def user_cache() -> Path:
    """The folder that holds the caches of all programs of this user; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def write_text(path: Path, text: str) -> None:
    """Write so that an interruption leaves the old file or the new one, never half.

    Args:
        path: The file.
        text: Its new content.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write so that an interruption leaves the old file or the new one, never half.

    Args:
        path: The file.
        content: Its new content.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, never half; numpy and tensor numbers become plain ones, NaN and infinity null.

    Args:
        path: The file.
        value: What to write.
    """
    write_text(path, json.dumps(_plain(value), indent=2, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str | bool | int) or value is None:
        return value
    return float(value) if math.isfinite(float(value)) else None
