"""The weights that a run would start with, and which parameters none of them reach."""

from collections import Counter
from typing import Any

import torch
from torch import nn

from segtrain.config.schema import RunConfig, SegmenterConfig
from segtrain.models import build_model
from segtrain.weights.load import initial_weights


def try_weights(config: RunConfig, num_classes: int) -> tuple[list[str], list[str]]:
    """Load the initial weights into a model that is thrown away.

    Args:
        config: Of the run.
        num_classes: K.

    Returns:
        What was done, a line each, and the names of the parameters that were not loaded; none
        where the run has no weights to load.

    Raises:
        UserError: If the weights cannot be had, or do not fit.
    """
    model = build_model(config.model, num_classes, image_size=config.data.crop)
    if not has_weights(config):
        return initial_weights(model, config), []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)  # what stays is not in the file
    lines = initial_weights(model, config)
    return lines, [name for name, value in model.named_parameters() if value.isnan().any()]


def has_weights(config: RunConfig) -> bool:
    """Whether training starts from anything but random numbers.

    Args:
        config: Of the run.

    Returns:
        The answer.
    """
    return config.init is not None or config.model.pretrained is not None


def without_weights(config: RunConfig) -> RunConfig:
    """The same run from random weights.

    Args:
        config: Of the run.

    Returns:
        Another configuration.
    """
    nothing, section = {"pretrained": None}, config.model
    if isinstance(section, SegmenterConfig):
        update: dict[str, Any] = nothing
    else:
        update = {"backbone": section.backbone.model_copy(update=nothing)}
    return config.model_copy(update={"model": section.model_copy(update=update), "init": None})


def by_part(names: list[str]) -> str:
    """Names of parameters as counts of the parts they belong to.

    Args:
        names: At least one.

    Returns:
        Such as "not loaded, random at first: head 12, aux_head 4 tensors".
    """
    counts = Counter(name.partition(".")[0] for name in names)
    said = ", ".join(f"{part} {count}" for part, count in counts.items())
    return f"not loaded, random at first: {said} tensors"


def not_finite(model: nn.Module) -> list[str]:
    """Parameters that hold NaN or infinity.

    Args:
        model: Any.

    Returns:
        Their names.
    """
    return [name for name, value in model.named_parameters() if not value.isfinite().all()]
