"""Weights into a model: a whole Segmenter, a start for other classes, a pretrained encoder."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from segtrain.config.schema import RunConfig, SegmenterConfig
from segtrain.errors import UserError
from segtrain.models.segmenter import SegmenterModel
from segtrain.weights.convert import Converted, understand
from segtrain.weights.fit import Fit, load_into
from segtrain.weights.layouts import TIMM
from segtrain.weights.read import SUFFIXES, WeightFile, read_weights
from segtrain.wording import plural

_ENCODER = ("encoder.",)


def load_weights(model: SegmenterModel, path: str | Path, *, new_classes: bool = False) -> Fit:
    """Load a whole model, in the layout of ours, the authors or MMSegmentation.

    Args:
        model: Where to.
        path: The file.
        new_classes: Whether parameters of another number of classes may start at random.

    Returns:
        What was loaded.

    Raises:
        UserError: If the file cannot be read, or does not fit; the model is untouched then.
    """
    found = understand(read_weights(path))
    if found.layout == TIMM:
        raise UserError(
            f"{path} holds an encoder alone; name it in model.pretrained, or take a whole model"
        )
    check_settings(model, found, str(path))
    return load_into(
        model, found.tensors, source=str(path), grid=found.grid, new_classes=new_classes
    )


def initial_weights(model: SegmenterModel, config: RunConfig) -> list[str]:
    """Give a model the weights that training starts from.

    Args:
        model: With random weights.
        config: `init` names a whole model; else `model.pretrained` an encoder.

    Returns:
        What was done, a line each.

    Raises:
        UserError: If the weights cannot be had, or do not fit.
    """
    if config.init is not None:
        fit = load_weights(model, config.init, new_classes=True)
        return [f"weights of {config.init}: {plural(len(fit.matched), 'tensor')}", *fit.notes()]
    if config.model.pretrained is not None:
        return load_encoder(model, config.model)
    return ["random weights: init and model.pretrained are null"]


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
    if Path(name).is_file() or Path(name).suffix in SUFFIXES:
        file = read_weights(name)
    else:
        file = WeightFile(path=Path(name), tensors=_from_timm(name))
    found = understand(file)
    fit = load_into(model, found.tensors, source=name, parts=_ENCODER, grid=found.grid)
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


def _from_timm(name: str) -> dict[str, Tensor]:
    """Weights of timm, downloaded or from its cache."""
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        raise UserError(
            f"model.pretrained {name} needs timm; run pip install timm, or name a file"
        ) from None
    if not timm.is_model(name.partition(".")[0]):
        raise UserError(
            f"model.pretrained {name} is neither a file nor a model of timm; names with tags stand "
            "in segtrain/models/backbones.py"
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
