"""What the sections of a configuration share: strictness, checks across keys, types of values."""

from collections.abc import Iterator
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _as_tuple(value: Any) -> Any:
    """YAML has lists; what is frozen holds tuples."""
    return tuple(value) if isinstance(value, list) else value


FromList = BeforeValidator(_as_tuple)
_MOST = 2**63 - 1  # what torch takes for a whole number
Count = Annotated[int, Field(ge=1, le=_MOST)]
CountOrZero = Annotated[int, Field(ge=0, le=_MOST)]
Side = Annotated[int, Field(ge=1, le=65535)]  # in pixels; no JPEG is longer
Byte = Annotated[int, Field(ge=0, le=255)]
LabelValue = Annotated[int, Field(ge=0, le=65535)]  # of a label map of up to 16 bits
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
Size = Annotated[tuple[Side, Side], FromList]


class Section(BaseModel):
    """A section of a configuration: no unknown key, no value of another type, no later change."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    def problems(self) -> Iterator[str]:
        """What is wrong between the keys of this section, each text with its fix."""
        yield from ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if problems := list(self.problems()):
            raise ValueError("\n".join(problems))
        return self
