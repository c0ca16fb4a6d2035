"""A Detectron2 backbone made of a bottom-up network and a pyramid neck from `ctxops`."""

import math
from collections.abc import Sequence

from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn


class PyramidBackbone(Backbone):
    """Bottom-up network followed by a neck that turns its maps into p2, p3, ...

    The neck maps a fine-to-coarse list of maps to a fine-to-coarse list that continues the
    strides by factors of two. It offers `size_ratio` (by how many finest-level cells an input
    must be divisible) and `aux_losses()` (name -> weighted scalar, used in training).

    Args:
        bottom_up: Network giving the maps named in `in_features`.
        neck: The neck; `in_features` order is its input order.
        in_features: Names of the bottom-up maps, fine to coarse, strides doubling.
        out_channels: Width of every output map.
        num_outputs: How many maps the neck returns.

    Raises:
        ValueError: If the strides of `in_features` do not double from map to map.
    """

    def __init__(
        self,
        *,
        bottom_up: Backbone,
        neck: nn.Module,
        in_features: Sequence[str],
        out_channels: int,
        num_outputs: int,
    ) -> None:
        super().__init__()
        shapes = bottom_up.output_shape()
        strides = [shapes[name].stride for name in in_features]
        if any(b != 2 * a for a, b in zip(strides, strides[1:], strict=False)):
            raise ValueError(
                f"IN_FEATURES must be fine to coarse with doubling strides, got "
                f"{dict(zip(in_features, strides, strict=True))}"
            )
        self.bottom_up = bottom_up
        self.neck = neck
        self._in_features = tuple(in_features)
        first = int(math.log2(strides[0]))
        self._shapes = {
            f"p{first + i}": ShapeSpec(channels=out_channels, stride=2 ** (first + i))
            for i in range(num_outputs)
        }
        self._size_divisibility = strides[0] * neck.size_ratio

    @property
    def size_divisibility(self) -> int:
        """Inputs are padded to a multiple of this many pixels."""
        return self._size_divisibility

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every output map by name, fine to coarse."""
        return dict(self._shapes)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Compute the pyramid.

        Args:
            image: [B, C, H, W], normalised, H and W multiples of `size_divisibility`.

        Returns:
            Map name -> [B, out_channels, H / stride, W / stride], fine to coarse.
        """
        features = self.bottom_up(image)
        maps = self.neck([features[name] for name in self._in_features])
        return dict(zip(self._shapes, maps, strict=True))

    def aux_losses(self) -> dict[str, Tensor]:
        """Weighted auxiliary losses of the neck, empty when it has none."""
        return self.neck.aux_losses()
