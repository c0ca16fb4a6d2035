"""Weight files of ours: written, and the configuration that they carry."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import yaml
from torch import Tensor

from segtrain.errors import UserError
from segtrain.files import write_bytes
from segtrain.weights.read import WeightFile

SUFFIX = ".safetensors"


def check_target(target: Path) -> None:
    """Refuse what is no name of a weight file of ours.

    Args:
        target: File to write.

    Raises:
        UserError: If it is no .safetensors.
    """
    if target.suffix != SUFFIX:
        raise UserError(f"OUT must end in {SUFFIX}, got {target}; name it {target.stem}{SUFFIX}")


def write_weights(target: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a weight file.

    Args:
        target: A .safetensors; its folder is made, an existing file is replaced.
        tensors: By name.
        metadata: Text fields.
    """
    whole = {name: value.contiguous().clone() for name, value in tensors.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    content = safetensors.torch.save(whole, metadata={"format": "pt", **metadata})
    write_bytes(target, content)


def stored_config(file: WeightFile) -> Mapping[str, Mapping[str, Any]]:
    """What a file of ours says of the configuration that it belongs to.

    Args:
        file: Any.

    Returns:
        Sections; empty where it says nothing.

    Raises:
        UserError: If the text field cannot be read.
    """
    try:
        content = json.loads(file.metadata.get("config", "{}"))
    except (RecursionError, ValueError):
        content = None
    if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
        raise UserError(f"{file.path}: its text field config is no JSON of sections; write it anew")
    return content


def as_yaml(config: Mapping[str, Any]) -> str:
    """Sections of a configuration as text.

    Args:
        config: Plain values; tuples become lists.

    Returns:
        YAML without a last line break.
    """
    return yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False).rstrip()
