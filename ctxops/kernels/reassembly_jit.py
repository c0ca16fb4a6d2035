# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
"""Content-aware reassembly in Triton's language; `reassembly` launches it.

Constants of a kernel are in capitals. Lanes of a warp run along the map, so that loads are
coalesced. Offsets inside a program are 32 bits wide (see `probe`), those of images and blocks of
channels 64.

Letters: C channels, H W map (height, width), Ho Wo map of windows (rows, columns), k window (SIZE),
s sub-pixels per axis (SCALE).
"""

import triton
import triton.language as tl

_SIZES = ["channels", "height", "width", "rows", "columns"]


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    x,
    kernels,
    out,
    channels,
    height,
    width,
    rows,
    columns,
    SIZE: tl.constexpr,
    SCALE: tl.constexpr,
    STRIDE: tl.constexpr,
    SUBS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SUM: tl.constexpr,
):
    """Tile [SUBS, BLOCK_C, BLOCK_P] of outputs: all sub-pixels of consecutive windows."""
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    window_blocks = tl.cdiv(rows * columns, BLOCK_P)
    program = tl.program_id(0)
    first = (program % channel_blocks) * BLOCK_C
    place = program // channel_blocks
    image = (place // window_blocks).to(tl.int64)

    sub = tl.arange(0, SUBS)[:, None, None]
    channel = tl.arange(0, BLOCK_C)[None, :, None]
    window = (place % window_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)[None, None, :]
    row = window // columns
    column = window % columns
    in_map = window < rows * columns
    in_channels = first + channel < channels
    in_subs = sub < SCALE * SCALE

    x += (image * channels + first) * height * width
    out += (image * channels + first) * (rows * columns * SCALE * SCALE)
    kernels += image * (SIZE * SIZE * SCALE * SCALE) * rows * columns
    total = tl.zeros([SUBS, BLOCK_C, BLOCK_P], SUM)
    for dy in range(SIZE):
        source_row = row * STRIDE + dy - SIZE // 2
        row_inside = in_map & (source_row >= 0) & (source_row < height)
        for dx in tl.static_range(SIZE):
            source_column = column * STRIDE + dx - SIZE // 2
            inside = row_inside & (source_column >= 0) & (source_column < width)
            pixels = tl.load(
                x + channel * (height * width) + (source_row * width + source_column),
                mask=inside & in_channels,
                other=0.0,
            )
            plane = (dy * SIZE + dx) * (SCALE * SCALE) + sub
            weights = tl.load(
                kernels + plane * (rows * columns) + window, mask=in_map & in_subs, other=0.0
            )
            total += weights.to(SUM) * pixels.to(SUM)
    target_row = row * SCALE + sub // SCALE
    target_column = column * SCALE + sub % SCALE
    target = channel * (rows * columns * SCALE * SCALE)
    target += target_row * (columns * SCALE) + target_column
    tl.store(out + target, total.to(out.dtype.element_ty), mask=in_map & in_subs & in_channels)


@triton.jit(do_not_specialize=_SIZES)
def grad_map_kernel(
    grad_out,
    kernels,
    grad_x,
    channels,
    height,
    width,
    rows,
    columns,
    SIZE: tl.constexpr,
    SCALE: tl.constexpr,
    STRIDE: tl.constexpr,
    TAPS: tl.constexpr,
    SUB_COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SUM: tl.constexpr,
):
    """Tile [BLOCK_R, BLOCK_C, BLOCK_P] of pixels that are STRIDE apart: one residue per axis."""
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    column_blocks = tl.cdiv(tl.cdiv(width, STRIDE), BLOCK_P)
    row_blocks = tl.cdiv(tl.cdiv(height, STRIDE), BLOCK_R)
    program = tl.program_id(0)
    first = program % channel_blocks * BLOCK_C
    place = program // channel_blocks
    first_column = (place % column_blocks) * BLOCK_P
    place = place // column_blocks
    residue = place % (STRIDE * STRIDE)
    place = place // (STRIDE * STRIDE)
    first_row = (place % row_blocks) * BLOCK_R
    image = (place // row_blocks).to(tl.int64)

    total = _gather(
        grad_out + (image * channels + first) * (rows * columns * SCALE * SCALE),
        kernels + image * (SIZE * SIZE * SCALE * SCALE) * rows * columns,
        channels - first,
        rows,
        columns,
        first_row,
        first_column,
        residue,
        SIZE,
        SCALE,
        STRIDE,
        TAPS,
        SUB_COLUMNS,
        BLOCK_R,
        BLOCK_C,
        BLOCK_P,
        SUM,
    )
    row = (first_row + tl.arange(0, BLOCK_R)[:, None, None]) * STRIDE + residue // STRIDE
    channel = tl.arange(0, BLOCK_C)[None, :, None]
    column = (first_column + tl.arange(0, BLOCK_P)[None, None, :]) * STRIDE + residue % STRIDE
    grad_x += (image * channels + first) * height * width
    tl.store(
        grad_x + channel * (height * width) + (row * width + column),
        total.to(grad_x.dtype.element_ty),
        mask=(row < height) & (column < width) & (first + channel < channels),
    )


@triton.jit
def _gather(
    grad_out,
    kernels,
    channels_left,
    rows,
    columns,
    first_row,
    first_column,
    residue,
    SIZE: tl.constexpr,
    SCALE: tl.constexpr,
    STRIDE: tl.constexpr,
    TAPS: tl.constexpr,
    SUB_COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SUM: tl.constexpr,
):
    """Sum over the windows that read a tile of pixels.

    Row n of the tile is pixel row STRIDE * n + residue // STRIDE, column n is pixel column STRIDE *
    n + residue % STRIDE. With shift = that rest + k // 2, tap shift % STRIDE + STRIDE * i of an
    axis belongs to window n + shift // STRIDE - i, 0 <= i < TAPS. All rows of the tile meet one row
    of windows at a time, with a tap each.
    """
    step = tl.arange(0, BLOCK_R)[:, None, None, None]
    channel = tl.arange(0, BLOCK_C)[None, :, None, None]
    position = first_column + tl.arange(0, BLOCK_P)[None, None, :, None]
    sub_column = tl.arange(0, SUB_COLUMNS)[None, None, None, :]
    # Tensors, not scalars: Triton's interpreter widens a mask that is joined with a scalar one.
    shift_row = tl.full([1, 1, 1, 1], residue // STRIDE + SIZE // 2, tl.int32)
    shift_column = tl.full([1, 1, 1, 1], residue % STRIDE + SIZE // 2, tl.int32)
    total = tl.zeros([BLOCK_R, BLOCK_C, BLOCK_P, SUB_COLUMNS], SUM)
    for line in range(TAPS + BLOCK_R - 1):
        window_row = first_row + shift_row // STRIDE - (TAPS - 1) + line
        index = step + (TAPS - 1) - line
        dy = shift_row % STRIDE + STRIDE * index
        row_inside = (window_row >= 0) & (window_row < rows)
        has_tap = (index >= 0) & (index < TAPS) & (dy < SIZE) & row_inside
        for tap in tl.static_range(TAPS):
            window_column = position + shift_column // STRIDE - tap
            dx = shift_column % STRIDE + STRIDE * tap
            inside = (window_column >= 0) & (window_column < columns) & (dx < SIZE)
            inside = inside & (sub_column < SCALE)
            for sub_row in tl.static_range(SCALE):
                source = (window_row * SCALE + sub_row) * (columns * SCALE)
                source += window_column * SCALE + sub_column
                gradients = tl.load(
                    grad_out + channel * (rows * columns * SCALE * SCALE) + source,
                    mask=inside & row_inside & (channel < channels_left),
                    other=0.0,
                )
                plane = (dy * SIZE + dx) * (SCALE * SCALE) + sub_row * SCALE + sub_column
                weights = tl.load(
                    kernels + plane * (rows * columns) + window_row * columns + window_column,
                    mask=inside & has_tap,
                    other=0.0,
                )
                total += weights.to(SUM) * gradients.to(SUM)
    return tl.sum(total, axis=3)


@triton.jit(do_not_specialize=_SIZES)
def grad_kernels_kernel(
    grad_out,
    x,
    grad_kernels,
    channels,
    height,
    width,
    rows,
    columns,
    SIZE: tl.constexpr,
    SCALE: tl.constexpr,
    STRIDE: tl.constexpr,
    SUBS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SUM: tl.constexpr,
):
    """Tile [BLOCK_T, SUBS, BLOCK_P] of kernels; warps share the channels and add up at the end.

    Without `max_contiguous` Triton lays lanes along the sub-pixels, and pixels go through shared
    memory every time.
    """
    tap_blocks: tl.constexpr = (SIZE * SIZE + BLOCK_T - 1) // BLOCK_T
    window_blocks = tl.cdiv(rows * columns, BLOCK_P)
    program = tl.program_id(0)
    place = program // tap_blocks
    image = (place // window_blocks).to(tl.int64)
    first_tap = (program % tap_blocks) * BLOCK_T
    first_window = (place % window_blocks) * BLOCK_P
    tap = first_tap + tl.arange(0, BLOCK_T)[:, None, None, None]
    sub = tl.arange(0, SUBS)[None, :, None, None]
    channel = tl.arange(0, BLOCK_C)[None, None, :, None]
    window = first_window + tl.arange(0, BLOCK_P)[None, None, None, :]
    row = window // columns
    column = window % columns
    in_map = window < rows * columns
    source_row = row * STRIDE + tap // SIZE - SIZE // 2
    source_column = column * STRIDE + tap % SIZE - SIZE // 2
    inside = in_map & (tap < SIZE * SIZE) & (source_row >= 0) & (source_row < height)
    inside = inside & (source_column >= 0) & (source_column < width)
    source = channel * (height * width) + (source_row * width + source_column)
    output = channel * (rows * columns * SCALE * SCALE)
    output += (row * SCALE + sub // SCALE) * (columns * SCALE) + column * SCALE + sub % SCALE
    output = tl.max_contiguous(output, [1, 1, 1, 1])
    in_outputs = in_map & (sub < SCALE * SCALE)
    x += image * channels * height * width
    grad_out += image * channels * (rows * columns * SCALE * SCALE)
    total = tl.zeros([BLOCK_T, SUBS, BLOCK_C, BLOCK_P], SUM)
    for start in range(0, channels, BLOCK_C):
        in_channels = start + channel < channels
        pixels = tl.load(x + source, mask=inside & in_channels, other=0.0)
        gradients = tl.load(grad_out + output, mask=in_outputs & in_channels, other=0.0)
        total += pixels.to(SUM) * gradients.to(SUM)
        x += BLOCK_C * height * width
        grad_out += BLOCK_C * rows * columns * SCALE * SCALE
    tap_3d = first_tap + tl.arange(0, BLOCK_T)[:, None, None]
    sub_3d = tl.arange(0, SUBS)[None, :, None]
    window_3d = first_window + tl.arange(0, BLOCK_P)[None, None, :]
    grad_kernels += image * (SIZE * SIZE * SCALE * SCALE) * rows * columns
    tl.store(
        grad_kernels + (tap_3d * (SCALE * SCALE) + sub_3d) * (rows * columns) + window_3d,
        tl.sum(total, axis=2).to(grad_kernels.dtype.element_ty),
        mask=(tap_3d < SIZE * SIZE) & (sub_3d < SCALE * SCALE) & (window_3d < rows * columns),
    )
