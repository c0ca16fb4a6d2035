"""Pretrained weights by the names that timm knows."""

import importlib
from pathlib import Path

from torch import Tensor

from segtrain.errors import UserError
from segtrain.weights.read import SUFFIXES


def is_file(name: str) -> bool:
    """Whether `pretrained` means a file.

    Args:
        name: What the configuration says.

    Returns:
        True where such a file exists, or the name ends like one.
    """
    return Path(name).is_file() or Path(name).suffix in SUFFIXES


def weights_of_timm(name: str) -> dict[str, Tensor]:
    """Weights of timm, downloaded or from its cache.

    Args:
        name: With or without a tag.

    Returns:
        The tensors, without those of the classifier.

    Raises:
        UserError: If timm is missing, does not know the name, or cannot fetch it.
    """
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        raise UserError(
            f"model.pretrained {name} needs timm; run pip install timm, or name a file"
        ) from None
    if not timm.is_model(name.partition(".")[0]):
        raise UserError(
            f"model.pretrained {name} is neither a file nor a model of timm; names with tags stand "
            "in segtrain/models/pretrained.py"
        )
    try:
        network = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # what a failed download raises depends on the hub's client
        reason = str(error).partition("\n")[0][:160]
        raise UserError(
            f"weights of {name} could not be fetched ({type(error).__name__}: {reason}); download "
            f"model.safetensors from https://huggingface.co/timm/{name} on a machine with network "
            "and write pretrained: PATH/model.safetensors"
        ) from error
    return network.state_dict()
