"""Any model of timm that gives feature maps, as a backbone; parameters keep timm's names.

Letters: B batch, H W image.
"""

import importlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from segtrain.config.timm_backbone import TimmConfig
from segtrain.errors import UserError
from segtrain.models.maps import MapInfo, Maps
from segtrain.normalisation import NORMALISATIONS
from segtrain.wording import did_you_mean

# What lets models with a position table or fixed windows take images of other sizes.
_ANY_SIZE = ({"dynamic_img_size": True}, {"strict_img_size": False})


class TimmBackbone(nn.Module):
    """Chosen maps of a timm model; what they do not need is cut off.

    Args:
        net: A model with `forward_intermediates`, pruned to the maps.
        maps: f1, f2, ...: what timm counts from 0.
        indices: Numbers of the maps in timm.
        normalisation: The pixels that its weights expect.
        unused: Names of the whole model's tensors that are cut off.
    """

    # Where the model's own names begin in this module.
    weights_prefix = "net."

    def __init__(
        self,
        net: nn.Module,
        *,
        maps: Maps,
        indices: Sequence[int],
        normalisation: str,
        unused: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        self.net = net
        self.maps = maps
        self.indices = list(indices)
        self.normalisation = normalisation
        self.unused = unused
        # Models round sizes down, up, or refuse them: whole cells only, so that maps lie right.
        self.multiple = max(info.stride for info in maps.values())

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Compute the maps.

        Args:
            image: [B, 3, H, W], H and W multiples of the largest stride.

        Returns:
            The maps by name.
        """
        found = self.net.forward_intermediates(
            image, indices=self.indices, norm=False, intermediates_only=True
        )
        return dict(zip(self.maps, found, strict=True))

    def no_weight_decay(self) -> set[str]:
        """Names of tables and tokens, as timm has them."""
        names = getattr(self.net, "no_weight_decay", set)()
        own = {name for name, _ in self.net.named_parameters()}
        return {f"{self.weights_prefix}{name}" for name in names if name in own}


def build_timm(config: TimmConfig, *, image_size: tuple[int, int]) -> TimmBackbone:
    """Build a model of timm with random weights; no file is read.

    Args:
        config: The section.
        image_size: (H, W) of a training crop; not used, models that take one size are refused.

    Returns:
        The backbone.

    Raises:
        UserError: If timm is missing or does not know the model, or the model gives no maps, takes
            images of one size only, or expects other pixels than we have.
    """
    settings = _settings(config)
    net = _created(config, fixed=settings.fixed_input_size)
    if not (hasattr(net, "forward_intermediates") and hasattr(net, "prune_intermediate_layers")):
        raise UserError(f"{config.model} of timm gives no feature maps; take another model")
    stages = net.feature_info
    indices = list(range(len(stages)) if config.out_indices is None else config.out_indices)
    if indices[-1] >= len(stages):
        raise UserError(
            f"model.backbone.out_indices {indices[-1]}: {config.model} has maps 0 to "
            f"{len(stages) - 1}"
        )
    whole = set(net.state_dict())
    net.prune_intermediate_layers(indices, prune_norm=True, prune_head=True)
    maps = {
        f"f{index + 1}": MapInfo(
            channels=stages[index]["num_chs"], stride=stages[index]["reduction"]
        )
        for index in indices
    }
    return TimmBackbone(
        net,
        maps=maps,
        indices=indices,
        normalisation=_normalisation(config.model, settings),
        unused=frozenset(whole - set(net.state_dict())),
    )


def _settings(config: TimmConfig) -> Any:
    """What timm knows about the model's weights."""
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        raise UserError("backbone timm needs timm; run pip install timm") from None
    base, _, tag = config.model.partition(".")
    if not timm.is_model(base):
        close = did_you_mean(base, timm.list_models())
        raise UserError(f"model.backbone.model {base} is no model of timm; {close}".rstrip("; "))
    known = timm.list_pretrained(f"{base}.*")
    if tag and config.model not in known:
        raise UserError(
            f"model.backbone.model {config.model}: timm has no such weights; "
            + (did_you_mean(config.model, known) or f"write model: {base}")
        )
    return timm.get_pretrained_cfg(config.model)


def _created(config: TimmConfig, *, fixed: bool) -> nn.Module:
    """The whole model, for images of any size."""
    timm = importlib.import_module("timm")
    base = config.model.partition(".")[0]
    options: dict[str, Any] = {"pretrained": False}
    if config.drop_path_rate:
        options["drop_path_rate"] = config.drop_path_rate
    if not fixed:
        return timm.create_model(base, **options)
    for any_size in _ANY_SIZE:
        try:
            return timm.create_model(base, **options, **any_size)
        except TypeError:  # it does not know the keyword
            continue
    raise UserError(f"{base} of timm takes images of one size only; take another model")


def _normalisation(model: str, settings: Any) -> str:
    """Key of `NORMALISATIONS`."""
    expected = tuple(settings.mean), tuple(settings.std)
    for name, known in NORMALISATIONS.items():
        if known == expected:
            return name
    raise UserError(
        f"{model} of timm expects pixels with mean {expected[0]} and deviation {expected[1]}; "
        f"there are {' and '.join(NORMALISATIONS)} only, take another model"
    )
