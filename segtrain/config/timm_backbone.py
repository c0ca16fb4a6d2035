"""Configuration of a backbone that timm makes."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from segtrain.config.base import CountOrZero, FromList, Rate, Section, Text


class TimmConfig(Section):
    """Any model of timm that gives feature maps."""

    name: Literal["timm"]
    """Which backbone."""

    model: Text
    """Its name in timm, with or without a tag, such as pvt_v2_b0.in1k."""

    out_indices: Annotated[tuple[CountOrZero, ...], Field(min_length=1), FromList] | None = None
    """Which of timm's maps to take, shallow to deep, from 0; null takes all. What lies behind the
    last of them is left out."""

    drop_path_rate: Rate = 0.0
    """Stochastic depth, for models that have it."""

    pretrained: Text | None = None
    """Weights: true for those of `model`, a name that timm knows, or a file; null starts from
    random ones."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        """`pretrained: true` means the model's own weights, `false` none."""
        if isinstance(values, dict) and isinstance(values.get("pretrained"), bool):
            own = values.get("model") if values["pretrained"] else None
            return {**values, "pretrained": own}
        return values

    def problems(self) -> Iterator[str]:
        """What is wrong between the keys of this section, each text with its fix."""
        indices = self.out_indices
        if indices is not None and list(indices) != sorted(set(indices)):
            yield f"out_indices must rise, got {list(indices)}; sort them"
