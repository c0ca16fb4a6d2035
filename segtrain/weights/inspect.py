"""What a weight file holds, and how it fits the model of a configuration."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from segtrain.config.load import load_config
from segtrain.errors import UserError
from segtrain.models import build_model
from segtrain.weights.convert import understand
from segtrain.weights.fit import compare
from segtrain.weights.layouts import TIMM
from segtrain.weights.read import read_weights
from segtrain.wording import first_of, plural


def summary(path: Path) -> dict[str, Any]:
    """What a file holds.

    Args:
        path: The file.

    Returns:
        Texts: layout, model, tensors, left_out (if anything is), config.

    Raises:
        UserError: If it cannot be read, or is of no known layout.
    """
    file = read_weights(path)
    found = understand(file)
    types = Counter(str(value.dtype).removeprefix("torch.") for value in file.tensors.values())
    numbers = sum(value.numel() for value in file.tensors.values())
    kinds = ", ".join(f"{count} {name}" for name, count in types.most_common())
    facts = {
        "file": str(path),
        "layout": found.layout,
        "model": str(found.architecture),
        "tensors": f"{plural(len(file.tensors), 'tensor')} ({kinds}), {numbers:,} numbers",
    }
    if found.left_out:
        facts["left out"] = f"{first_of(found.left_out)} (ImageNet classifiers)"
    return facts | {"config": found.yaml()}


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
    found = understand(read_weights(path))
    config = load_config(config_file)
    classes = max(found.architecture.num_classes, 1)
    with torch.device("meta"):
        model = build_model(config.model, classes, image_size=config.data.crop)
    parts = ("encoder.",) if found.layout == TIMM else ("encoder.", "decoder.")
    try:
        fit = compare(model, found.tensors, source=str(path), parts=parts, grid=found.grid)
    except UserError as error:
        return str(error)
    verdict = "fits" if fit.complete else "does not fit"
    lines = [fit.table(), f"{verdict} the model of {config_file}", *fit.notes()]
    return "\n".join(lines)
