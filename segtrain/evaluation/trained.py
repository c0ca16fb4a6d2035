"""A trained model with everything it was trained on, from a run folder or a configuration."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from segtrain.config.load import load_config
from segtrain.config.schema import RunConfig
from segtrain.data.datasets import Layout, build_layout
from segtrain.errors import UserError
from segtrain.evaluation.evaluate import build_inferencer
from segtrain.inference import Inferencer
from segtrain.models import build_model
from segtrain.train.checkpoint import FOLDER
from segtrain.train.folder import CONFIG_NAME
from segtrain.weights.load import load_weights

NAMES = ("best", "last")


@dataclass(frozen=True)
class Trained:
    """A model that can predict.

    Attributes:
        model: In evaluation mode, on `device`.
        config: Of its run.
        layout: Its data set.
        weights: The file of its weights.
        device: Where it is.
    """

    model: nn.Module
    config: RunConfig
    layout: Layout
    weights: Path
    device: torch.device

    def inferencer(self, *, precision: str = "fp32") -> Inferencer:
        """The inference that the configuration describes.

        Args:
            precision: "fp32" or "bf16".

        Returns:
            The inferencer.
        """
        return build_inferencer(
            self.model, self.config, self.layout, self.device, precision=precision
        )


def load_trained(
    source: Path,
    *,
    weights: str | None = None,
    overrides: Sequence[str] = (),
    device: torch.device | str = "cpu",
) -> Trained:
    """Load a model.

    Args:
        source: A run folder, or a configuration file.
        weights: "best", "last" or a file; None takes the best of a run, else its last.
        overrides: `key=value` over the configuration.
        device: Where to.

    Returns:
        The model, its data set and its configuration.

    Raises:
        UserError: If something is missing or does not fit.
    """
    config_path = source / CONFIG_NAME if source.is_dir() else source
    if source.is_dir() and not config_path.is_file():
        raise UserError(f"{source} is no run, it has no {CONFIG_NAME}; name the output of a run")
    config = load_config(config_path, overrides)
    path = find_weights(source, weights)
    layout = build_layout(config.data)
    model = build_model(config.model, len(layout.classes), image_size=config.data.crop)
    load_weights(model, path)
    return Trained(model.to(device).eval(), config, layout, path, torch.device(device))


def find_weights(source: Path, weights: str | None) -> Path:
    """The file that was meant.

    Args:
        source: A run folder, or a configuration file.
        weights: As in `load_trained`.

    Returns:
        An existing file.

    Raises:
        UserError: If there is none.
    """
    if weights not in (None, *NAMES):
        if not Path(weights).is_file():
            raise UserError(f"no weight file {weights}; name a file, or best or last of a run")
        return Path(weights)
    if not source.is_dir():
        raise UserError(
            f"{source} is a configuration and has no weights of its own; add --weights FILE"
        )
    names = NAMES if weights is None else (weights,)
    places = [source / FOLDER / f"{name}.safetensors" for name in names]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise UserError(
            f"no {' or '.join(path.name for path in places)} in {places[0].parent}; train first, "
            "or add --weights FILE"
        )
    return found


def choose_device(name: str | None) -> torch.device:
    """The device that was asked for.

    Args:
        name: "cpu", "cuda", "cuda:1", ...; None takes a GPU where there is one.

    Returns:
        The device.

    Raises:
        UserError: If it is not there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"device {name!r} cannot be used: {str(error).splitlines()[0]}; take --device cpu"
        ) from error
    return device
