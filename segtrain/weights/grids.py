"""Tables with a vector per cell of a grid: found in a model, and brought to the model's grid."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt

from torch import Tensor, nn

from ctxops.position import GridEmbedding, resize_position_embedding
from ctxops.vit import VisionTransformer
from segtrain.errors import UserError

Grid = tuple[int, int]
FIELD = "grids"  # of the text fields of a file


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of a model.

    Attributes:
        what: What messages call it.
        grid: (h, w).
        channels: Width of its vectors.
        num_prefix: Rows before those of the grid.
        mode: How it is resized.
    """

    what: str
    grid: Grid
    channels: int
    num_prefix: int = 0
    mode: str = "bilinear"


def tables_of(model: nn.Module) -> dict[str, Table]:
    """The tables of a model: positions of transformers, learnt queries.

    Args:
        model: Any.

    Returns:
        Name of the parameter -> table.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, VisionTransformer):
            found[_joined(name, "pos_embed")] = Table(
                what="position table",
                grid=module.grid,
                channels=module.pos_embed.shape[-1],
                num_prefix=module.num_prefix,
                mode=module.pos_embed_resize,
            )
        elif isinstance(module, GridEmbedding):
            width = module.weight.shape[-1]
            found[_joined(name, "weight")] = Table(
                what="query table", grid=module.grid, channels=width
            )
    return found


def fitted(
    values: Tensor, table: Table, *, grid: Grid | None, source: str
) -> tuple[Tensor, tuple[Grid, Grid] | None]:
    """Values of a file for the table of a model.

    Args:
        values: [1, P + h w, d] or [h w, d].
        table: Of the model.
        grid: (h, w) of the values. None: that of the model where it has as many cells, else a
            square.
        source: What messages call the file.

    Returns:
        The values on the model's grid, and both grids where they differ.

    Raises:
        UserError: If the grid of the values is unknown.
    """
    if values.dim() not in (2, 3) or values.shape[-1] != table.channels:
        return values, None  # the comparison of shapes will say so
    wanted, prefix = table.grid, table.num_prefix
    count = values.shape[-2] - prefix
    if grid is None:
        grid = wanted if count == wanted[0] * wanted[1] else square_grid(count)
    if grid is None or grid[0] * grid[1] != count:
        raise UserError(
            f"{source}: the {table.what} has {values.shape[-2]} rows, expected {prefix} and a "
            f"square grid, or one of {wanted[0]}x{wanted[1]}; check model.distilled and data.crop"
        )
    if grid == wanted:
        return values, None
    new = resize_position_embedding(
        values if values.dim() == 3 else values[None],
        old_grid=grid,
        new_grid=wanted,
        num_prefix=prefix,
        mode=table.mode,
    )
    return new if values.dim() == 3 else new[0], (grid, wanted)


def square_grid(count: int) -> Grid | None:
    """The square of so many cells.

    Args:
        count: Number of cells.

    Returns:
        (h, w), None where there is none.
    """
    side = isqrt(max(count, 0))
    return (side, side) if side and side * side == count else None


def grids_as_text(model: nn.Module) -> str:
    """The grids of a model's tables for a text field.

    Args:
        model: Any.

    Returns:
        JSON, name -> [h, w].
    """
    return json.dumps({name: table.grid for name, table in tables_of(model).items()})


def grids_of_text(metadata: Mapping[str, str]) -> dict[str, Grid]:
    """The grids that a file tells.

    Args:
        metadata: Its text fields.

    Returns:
        Name -> (h, w); empty where it tells none that can be read.
    """
    try:
        content = json.loads(metadata.get(FIELD, "{}"))
        return {str(name): (int(h), int(w)) for name, (h, w) in content.items()}
    except (AttributeError, OverflowError, RecursionError, TypeError, ValueError):
        return {}


def _joined(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name
