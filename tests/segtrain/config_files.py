"""A small valid configuration, and writing it with changes."""

from copy import deepcopy
from pathlib import Path

import yaml

SMALL = {
    "data": {"dataset": "camvid", "root": "camvid", "crop": [64, 96], "base_size": [128, 96]},
    "model": {"name": "segmenter", "variant": "Ti"},
    "optim": {"lr": 0.001},
    "train": {"iters": 100, "global_batch": 8},
}


def small(**changes) -> dict:
    """The configuration with values set by keys such as `data__crop`."""
    content = deepcopy(SMALL)
    for key, value in changes.items():
        *sections, name = key.split("__")
        node = content
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return content


def write(path: Path, content: dict) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
