"""Weights into a model: a whole one, a start for other classes, a pretrained encoder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from segtrain.config.schema import RunConfig, SegmenterConfig
from segtrain.errors import UserError
from segtrain.models.network import Network
from segtrain.models.segmenter import SegmenterModel
from segtrain.weights.convert import Converted, understand
from segtrain.weights.fit import Fit, load_into
from segtrain.weights.layouts import TIMM
from segtrain.weights.network import load_backbone, load_network
from segtrain.weights.read import WeightFile, read_weights
from segtrain.weights.timm_hub import is_file, weights_of_timm
from segtrain.wording import plural

_ENCODER = ("encoder.",)


def load_weights(model: nn.Module, path: str | Path, *, new_classes: bool = False) -> Fit:
    """Load a whole model; a Segmenter in the layout of ours, the authors or MMSegmentation.

    Args:
        model: Where to.
        path: The file.
        new_classes: Whether parameters of another number of classes may start at random.

    Returns:
        What was loaded.

    Raises:
        UserError: If the file cannot be read, or does not fit; the model is untouched then.
    """
    if isinstance(model, Network):
        return load_network(model, path, new_classes=new_classes)
    found = understand(read_weights(path))
    if found.layout == TIMM:
        raise UserError(
            f"{path} holds an encoder alone; name it in model.pretrained, or take a whole model"
        )
    check_settings(model, found, str(path))
    return load_into(
        model, found.tensors, source=str(path), grids=found.grids, new_classes=new_classes
    )


def initial_weights(model: nn.Module, config: RunConfig) -> list[str]:
    """Give a model the weights that training starts from.

    Args:
        model: With random weights.
        config: `init` names a whole model; else `pretrained` of the model an encoder.

    Returns:
        What was done, a line each.

    Raises:
        UserError: If the weights cannot be had, or do not fit.
    """
    if config.init is not None:
        fit = load_weights(model, config.init, new_classes=True)
        return [f"weights of {config.init}: {plural(len(fit.matched), 'tensor')}", *fit.notes()]
    name = config.model.pretrained
    if name is not None and isinstance(model, Network):
        return load_backbone(model, name)
    if name is not None:
        return load_encoder(model, config.model)
    place = "model.backbone" if isinstance(model, Network) else "model"
    lines = [f"random weights: init and {place}.pretrained are null"]
    if getattr(config.model, "freeze_backbone", False):
        lines.append(
            "model.freeze_backbone keeps random weights: the backbone never learns; name weights "
            "(model.backbone.pretrained, init), or write model.freeze_backbone: false"
        )
    return lines


def load_encoder(model: SegmenterModel, config: SegmenterConfig) -> list[str]:
    """Load a pretrained encoder.

    Args:
        model: Where to.
        config: Its `pretrained` is a file, or a name that timm knows.

    Returns:
        What was done, a line each.

    Raises:
        UserError: If the weights cannot be had, or do not fit.
    """
    name = config.pretrained
    assert name is not None, "called without pretrained weights"
    if is_file(name):
        file = read_weights(name)
    else:
        file = WeightFile(path=Path(name), tensors=weights_of_timm(name))
    found = understand(file)
    fit = load_into(model, found.tensors, source=name, parts=_ENCODER, grids=found.grids)
    return [f"encoder of {name}: {plural(len(fit.matched), 'tensor')}", *fit.notes()]


def check_settings(model: SegmenterModel, found: Converted, source: str) -> None:
    """Refuse weights that were made for other settings than the model's, which no tensor shows.

    Args:
        model: The model.
        found: What the file holds.
        source: What messages call the file.

    Raises:
        UserError: If eps, the resizing of positions or Eq. 4's normalisation differ.
    """
    has = _settings(model)
    wants: Mapping[str, Any] = found.config.get("model", {})
    wrong = {k: wants[k] for k in has if wants.get(k) not in (None, has[k])}
    if wrong:
        values = ", ".join(f"{key}: {value}" for key, value in wrong.items())
        raise UserError(f"{source} was made with other settings; write in model: {values}")


def _settings(model: SegmenterModel) -> dict[str, Any]:
    """Settings that change the output but no shape."""
    encoder, decoder = model.encoder, model.decoder
    settings = {
        "layer_norm_eps": encoder.norm.eps,
        "pos_embed_resize": encoder.pos_embed_resize,
    }
    if hasattr(decoder, "decoder_norm"):
        settings["decoder_layer_norm_eps"] = decoder.decoder_norm.eps
        settings["normalize_classes"] = decoder.normalize_classes
    return settings
