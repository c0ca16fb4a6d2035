"""What backbones offer and heads ask for: named maps, shallow to deep."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from segtrain.errors import UserError

Features = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class MapInfo:
    """One map of a backbone.

    Attributes:
        channels: Number of channels.
        stride: Pixels of the image per cell.
    """

    channels: int
    stride: int


# Name -> map, shallow to deep; of equal strides the later is the deeper.
Maps = Mapping[str, MapInfo]


def deepest(maps: Maps, count: int, *, head: str) -> tuple[str, ...]:
    """Names of the deepest maps, shallow to deep.

    Args:
        maps: What the backbone offers.
        count: How many.
        head: What messages call the one who asks.

    Returns:
        `count` names.

    Raises:
        UserError: If there are fewer.
    """
    if len(maps) < count:
        raise UserError(
            f"{head} needs {count} maps, the backbone offers {_shown(maps)}; take another backbone"
        )
    return tuple(maps)[-count:]


def at_stride(maps: Maps, stride: int, *, head: str) -> str:
    """Name of the deepest map of a stride.

    Args:
        maps: What the backbone offers.
        stride: Pixels per cell.
        head: What messages call the one who asks.

    Returns:
        The name.

    Raises:
        UserError: If there is none.
    """
    found = [name for name, one in maps.items() if one.stride == stride]
    if not found:
        raise UserError(
            f"{head} needs a map at 1/{stride}, the backbone offers {_shown(maps)}; take another "
            "backbone"
        )
    return found[-1]


def _shown(maps: Maps) -> str:
    return ", ".join(f"{name} (1/{m.stride}, {m.channels} channels)" for name, m in maps.items())
