# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
"""Deformable attention in Triton's language; `deformable` launches it.

Constants of a kernel are in capitals. Lanes of a warp run along the width of a head, so that every
sample is one coalesced read. Offsets inside an image are 32 bits wide (see `probe`).

Letters: Q queries, M heads, D width of a head, L levels, N points per head and level, S tokens of
all levels, H W map of a level (rows, columns); stride = L N, start = first token of the level.
"""

import triton
import triton.language as tl

_FORWARD_SIZES = ["queries", "heads", "width", "points", "tokens", "stride", "level", "start"]
_VALUE_SIZES = ["heads", "width", "points", "tokens", "stride", "level", "start"]


@triton.jit
def _pixel(locations, sample, rows, columns, mask, SUM: tl.constexpr):
    """(x, y) of samples in pixels; what is far outside is moved nearer, and stays outside."""
    x = tl.load(locations + 2 * sample, mask=mask, other=0.0).to(SUM) * columns - 0.5
    y = tl.load(locations + 2 * sample + 1, mask=mask, other=0.0).to(SUM) * rows - 0.5
    x = tl.minimum(tl.maximum(x, -2.0), columns + 1.0)
    y = tl.minimum(tl.maximum(y, -2.0), rows + 1.0)
    return x, y


@triton.jit
def _corner(values, row, column, rows, columns, token_width, mask, SUM: tl.constexpr):
    """Values at integer positions, zero outside the map."""
    inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    offset = (row * columns + column) * token_width
    return tl.load(values + offset, mask=inside & mask, other=0.0).to(SUM)


@triton.jit(do_not_specialize=[*_FORWARD_SIZES, "rows", "columns"])
def forward_kernel(
    value,
    locations,
    weights,
    out,
    queries,
    heads,
    width,
    points,
    tokens,
    stride,
    level,
    start,
    rows,
    columns,
    FIRST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SUM: tl.constexpr,
):
    """Tile [BLOCK_Q, BLOCK_D] of the output of one head: what one level adds to it."""
    program = tl.program_id(0)
    head = program % heads
    place = program // heads
    blocks = tl.cdiv(queries, BLOCK_Q)
    image = (place // blocks).to(tl.int64)
    query = (place % blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)[:, None]
    channel = tl.arange(0, BLOCK_D)[None, :]
    in_queries = query < queries
    mask = in_queries & (channel < width)

    values = value + (image * tokens + start) * heads * width + head * width + channel
    locations += image * queries * heads * stride * 2
    weights += image * queries * heads * stride
    out += image * queries * heads * width
    target = (query * heads + head) * width + channel
    if FIRST:
        total = tl.zeros([BLOCK_Q, BLOCK_D], SUM)
    else:
        total = tl.load(out + target, mask=mask, other=0.0)
    for point in range(points):
        sample = (query * heads + head) * stride + level * points + point
        x, y = _pixel(locations, sample, rows, columns, in_queries, SUM)
        weight = tl.load(weights + sample, mask=in_queries, other=0.0).to(SUM)
        left = tl.floor(x)
        top = tl.floor(y)
        for corner in tl.static_range(4):
            row = top.to(tl.int32) + corner // 2
            column = left.to(tl.int32) + corner % 2
            share = (1 - tl.abs(y - row)) * (1 - tl.abs(x - column))
            pixel = _corner(values, row, column, rows, columns, heads * width, mask, SUM)
            total += weight * share * pixel
    tl.store(out + target, total, mask=mask)


@triton.jit
def _interpolated(
    values,
    x,
    y,
    rows,
    columns,
    token_width,
    mask,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SUM: tl.constexpr,
):
    """Bilinear samples [BLOCK_Q, BLOCK_D], and their derivatives by x and y in pixels."""
    left = tl.floor(x)
    top = tl.floor(y)
    sampled = tl.zeros([BLOCK_Q, BLOCK_D], SUM)
    slope_x = tl.zeros([BLOCK_Q, BLOCK_D], SUM)
    slope_y = tl.zeros([BLOCK_Q, BLOCK_D], SUM)
    for corner in tl.static_range(4):
        row = top.to(tl.int32) + corner // 2
        column = left.to(tl.int32) + corner % 2
        share_x = 1 - tl.abs(x - column)
        share_y = 1 - tl.abs(y - row)
        pixel = _corner(values, row, column, rows, columns, token_width, mask, SUM)
        sampled += share_y * share_x * pixel
        slope_x += (2 * (corner % 2) - 1) * share_y * pixel
        slope_y += (2 * (corner // 2) - 1) * share_x * pixel
    return sampled, slope_x, slope_y


@triton.jit(do_not_specialize=[*_FORWARD_SIZES, "rows", "columns"])
def grad_samples_kernel(
    grad_out,
    value,
    locations,
    weights,
    grad_locations,
    grad_weights,
    queries,
    heads,
    width,
    points,
    tokens,
    stride,
    level,
    start,
    rows,
    columns,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SUM: tl.constexpr,
):
    """Gradients of the locations and weights of BLOCK_Q queries, one head and one level."""
    program = tl.program_id(0)
    head = program % heads
    place = program // heads
    blocks = tl.cdiv(queries, BLOCK_Q)
    image = (place // blocks).to(tl.int64)
    query = (place % blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)[:, None]
    channel = tl.arange(0, BLOCK_D)[None, :]
    in_queries = query < queries
    mask = in_queries & (channel < width)

    values = value + (image * tokens + start) * heads * width + head * width + channel
    first_sample = image * queries * heads * stride
    grad_out += image * queries * heads * width
    source = (query * heads + head) * width + channel
    gradient = tl.load(grad_out + source, mask=mask, other=0.0).to(SUM)
    for point in range(points):
        sample = (query * heads + head) * stride + level * points + point
        x, y = _pixel(locations + 2 * first_sample, sample, rows, columns, in_queries, SUM)
        weight = tl.load(weights + first_sample + sample, mask=in_queries, other=0.0).to(SUM)
        sampled, slope_x, slope_y = _interpolated(
            values, x, y, rows, columns, heads * width, mask, BLOCK_Q, BLOCK_D, SUM
        )
        by_x = weight * columns * tl.sum(gradient * slope_x, axis=1, keep_dims=True)
        by_y = weight * rows * tl.sum(gradient * slope_y, axis=1, keep_dims=True)
        by_weight = tl.sum(gradient * sampled, axis=1, keep_dims=True)
        target = grad_locations + 2 * (first_sample + sample)
        tl.store(target, by_x.to(grad_locations.dtype.element_ty), mask=in_queries)
        tl.store(target + 1, by_y.to(grad_locations.dtype.element_ty), mask=in_queries)
        by_weight = by_weight.to(grad_weights.dtype.element_ty)
        tl.store(grad_weights + first_sample + sample, by_weight, mask=in_queries)


@triton.jit(do_not_specialize=[*_VALUE_SIZES, "rows", "columns"])
def grad_value_kernel(
    grad_out,
    locations,
    weights,
    order,
    starts,
    grad_value,
    heads,
    width,
    points,
    tokens,
    stride,
    level,
    start,
    rows,
    columns,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SUM: tl.constexpr,
):
    """Gradient of one pixel of one head: the samples of the cells around it, in sorted order.

    Cell (i, j) of the (rows + 1) x (columns + 1) of a map lies between pixels i - 1 and i, j - 1
    and j. The two cells beside each other above a pixel are neighbours in the order, and so are
    those below.
    """
    program = tl.program_id(0)
    head = program % heads
    place = program // heads
    column = place % columns
    row = (place // columns) % rows
    image = place // (columns * rows)
    channel = tl.arange(0, BLOCK_D)[None, :]
    in_width = channel < width
    total = tl.zeros([1, BLOCK_D], SUM)
    for below in tl.static_range(2):
        cell = (image * heads + head) * (rows + 1) + row + below
        cell = cell * (columns + 1) + column
        first = tl.load(starts + cell)
        last = tl.load(starts + cell + 2)
        for step in range(first, last, BLOCK_E):
            entry = step + tl.arange(0, BLOCK_E)[:, None]
            found = entry < last
            index = tl.load(order + entry, mask=found, other=0)
            sample = (index // points).to(tl.int64) * stride + level * points + index % points
            x, y = _pixel(locations, sample, rows, columns, found, SUM)
            weight = tl.load(weights + sample, mask=found, other=0.0).to(SUM)
            share = tl.maximum(1 - tl.abs(x - column), 0.0) * tl.maximum(1 - tl.abs(y - row), 0.0)
            source = (index // points).to(tl.int64) * width + channel
            gradient = tl.load(grad_out + source, mask=found & in_width, other=0.0).to(SUM)
            total += tl.sum(weight * share * gradient, axis=0, keep_dims=True)
    token = image.to(tl.int64) * tokens + start + row * columns + column
    target = (token * heads + head) * width + channel
    tl.store(grad_value + target, total.to(grad_value.dtype.element_ty), mask=in_width)
