"""`variant.yml`, which the authors' code writes beside `checkpoint.pth`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from segtrain.errors import UserError

NAME = "variant.yml"
_NORMALISATIONS = {"vit": "vit", "deit": "imagenet", "imagenet": "imagenet"}
_DECODERS = {"linear": "linear", "mask_transformer": "mask"}


class _Loader(yaml.SafeLoader):
    """The safe loader, and tuples, which it refuses: nothing else that YAML can name."""


_Loader.add_constructor(
    "tag:yaml.org,2002:python/tuple",
    lambda loader, node: tuple(loader.construct_sequence(node)),
)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What `variant.yml` says, in the words of our configuration.

    Attributes:
        num_heads: Heads of every layer.
        num_classes: K.
        model: Keys of the section `model` that no tensor tells.
        data: Keys of the section `data`.
        eval: Keys of the section `eval`.
    """

    num_heads: int
    num_classes: int
    model: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    eval: Mapping[str, Any] = field(default_factory=dict)


def read_variant(path: str | Path) -> Variant:
    """Read a `variant.yml`.

    Args:
        path: The file.

    Returns:
        What it says.

    Raises:
        UserError: If it is absent, no such YAML, or lacks a key.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; name the {NAME} of the checkpoint") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; mend the path") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"{path} is no plain YAML ({line[:120]}); take the authors' file") from None
    try:
        return _variant(content)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} lacks {error}; expected the {NAME} of the authors' code") from None
    except (AttributeError, OverflowError, ValueError) as error:
        problem = f"holds what it should not ({error!s:.100})"
        raise UserError(f"{path} {problem}; expected the {NAME} of the authors' code") from None


def _variant(content: Mapping[str, Any]) -> Variant:
    net, decoder = content["net_kwargs"], content["net_kwargs"]["decoder"]
    model = {
        "dropout": float(net["dropout"]),
        "drop_path_rate": float(net["drop_path_rate"]),
        "decoder": _DECODERS[decoder["name"]],
        # Some released files leave it out where it is False.
        "distilled": bool(net.get("distilled", False)),
    }
    if model["decoder"] == "mask":
        model["decoder_layers"] = int(decoder["n_layers"])
        model["decoder_dropout"] = float(decoder["dropout"])
        model["decoder_drop_path"] = float(decoder["drop_path_rate"])
    side = int(_first(content.get("dataset_kwargs", {}).get("crop_size", net["image_size"])))
    inference = content.get("inference_kwargs", {})
    return Variant(
        num_heads=int(net["n_heads"]),
        num_classes=int(net["n_cls"]),
        model=model,
        data={"crop": [side, side], "normalisation": _NORMALISATIONS[net["normalization"]]},
        eval={
            ours: int(inference[theirs])
            for ours, theirs in (("window", "window_size"), ("stride", "window_stride"))
            if theirs in inference
        },
    )


def _first(size: Any) -> Any:
    """Height of an image size, which is a number or a pair."""
    return size[0] if isinstance(size, list | tuple) else size
