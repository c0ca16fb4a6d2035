"""Weights into a network of backbone and head: all of it, or a pretrained backbone."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from segtrain.errors import UserError
from segtrain.models.network import Network
from segtrain.weights.fit import Fit, load_into
from segtrain.weights.read import read_weights
from segtrain.weights.timm_hub import is_file, weights_of_timm
from segtrain.wording import plural

_BACKBONE = "backbone."
# ImageNet classifiers, which no map depends on.
_CLASSIFIERS = re.compile(r"^(fc|head|head_dist|norm|fc_norm|pre_logits\.\w+)\.(weight|bias)$")


def load_network(model: Network, path: str | Path, *, new_classes: bool = False) -> Fit:
    """Load a whole network.

    Args:
        model: Where to.
        path: A file of ours.
        new_classes: Whether parameters of another number of classes may start at random.

    Returns:
        What was loaded.

    Raises:
        UserError: If the file cannot be read, or does not fit; the model is untouched then.
    """
    tensors = read_weights(path).tensors
    return load_into(model, tensors, source=str(path), parts=("",), new_classes=new_classes)


def load_backbone(model: Network, name: str) -> list[str]:
    """Load a pretrained backbone, all of its tensors: another stem is refused.

    Args:
        model: Where to.
        name: A file, or a name that timm knows.

    Returns:
        What was done, a line each.

    Raises:
        UserError: If the weights cannot be had, or do not fit.
    """
    tensors = read_weights(name).tensors if is_file(name) else weights_of_timm(name)
    fit = load_into(model, _renamed(tensors, name), source=name, parts=(_BACKBONE,))
    return [f"backbone of {name}: {plural(len(fit.matched), 'tensor')}", *fit.notes()]


def _renamed(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Of a network of ours its backbone, else all but the classifier."""
    own = {name: value for name, value in tensors.items() if name.startswith(_BACKBONE)}
    if own:
        return own
    kept = {n: value for n, value in tensors.items() if not _CLASSIFIERS.match(n)}
    if not kept:
        raise UserError(f"{source} holds no weights of a backbone; take another file")
    return {f"{_BACKBONE}{name}": value for name, value in kept.items()}
