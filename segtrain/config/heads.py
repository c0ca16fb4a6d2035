"""Configuration of heads; one class each, told apart by `name`."""

from typing import Annotated

from pydantic import Field

from segtrain.config.fpt import FptHeadConfig
from segtrain.config.mlp import MlpHeadConfig
from segtrain.config.sr import (
    ASPPHeadConfig,
    ContextHeadConfig,
    DeepLabPlusHeadConfig,
    DFHeadConfig,
    PSPHeadConfig,
)
from segtrain.config.unept import UneptConfig

HeadConfig = Annotated[
    ContextHeadConfig
    | PSPHeadConfig
    | ASPPHeadConfig
    | DFHeadConfig
    | DeepLabPlusHeadConfig
    | FptHeadConfig
    | MlpHeadConfig
    | UneptConfig,
    Field(discriminator="name"),
]
