"""Sine encodings by hand, resized tables by grid, cell centres."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ctxops.position import (
    GridEmbedding,
    cell_centres,
    pyramid_position,
    resize_position_embedding,
    sine_position,
)
from tests.shared_data import SHARED, needs_shared

GRIDS = st.tuples(st.integers(1, 7), st.integers(1, 7))


def linear_weights(old, new):
    """[new, old] matrix of linear interpolation, written from the definition (edges matched)."""
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        centre = min(max((i + 0.5) * old / new - 0.5, 0), old - 1)
        low = min(int(centre), old - 1)
        matrix[i, low] += 1 - (centre - low)
        matrix[i, min(low + 1, old - 1)] += centre - low
    return matrix


@settings(max_examples=40, deadline=None)
@given(old=GRIDS, new=GRIDS, num_prefix=st.integers(0, 2))
def test_resize_equals_two_matrices_of_linear_interpolation(old, new, num_prefix):
    table = torch.randn(1, num_prefix + old[0] * old[1], 3, dtype=torch.float64)
    resized = resize_position_embedding(table, old_grid=old, new_grid=new, num_prefix=num_prefix)
    cells = table[0, num_prefix:].view(*old, 3)
    rows, columns = linear_weights(old[0], new[0]), linear_weights(old[1], new[1])
    expected = torch.einsum("ai,bj,ijd->abd", rows, columns, cells).flatten(0, 1)
    torch.testing.assert_close(resized[0, num_prefix:], expected, rtol=0, atol=1e-12)
    assert torch.equal(resized[:, :num_prefix], table[:, :num_prefix])


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_equal_grids_return_the_table_itself(mode):
    table = torch.randn(1, 2 + 12, 5)
    same = resize_position_embedding(
        table, old_grid=(3, 4), new_grid=(3, 4), num_prefix=2, mode=mode
    )
    assert same is table


def test_grids_of_equal_count_are_told_apart():
    table = torch.randn(1, 1 + 16, 5)
    wide = resize_position_embedding(table, old_grid=(4, 4), new_grid=(2, 8), num_prefix=1)
    assert wide.shape == table.shape
    assert (wide - table)[:, 1:].abs().mean() > 0.1
    assert torch.equal(wide[:, 0], table[:, 0])


def test_bicubic_is_cubic_and_not_antialiased():
    table = torch.randn(1, 30, 4)
    resized = resize_position_embedding(
        table, old_grid=(5, 6), new_grid=(3, 9), num_prefix=0, mode="bicubic"
    )
    image = table.view(1, 5, 6, 4).permute(0, 3, 1, 2)
    expected = F.interpolate(image, size=(3, 9), mode="bicubic", align_corners=False)
    torch.testing.assert_close(resized, expected.flatten(2).transpose(1, 2))
    bilinear = resize_position_embedding(table, old_grid=(5, 6), new_grid=(3, 9), num_prefix=0)
    assert (resized - bilinear).abs().max() > 0.01


def test_half_precision_tables_are_resized_in_float32():
    table = torch.randn(1, 1 + 20, 8).bfloat16()
    arguments = {"old_grid": (4, 5), "new_grid": (7, 3), "num_prefix": 1}
    resized = resize_position_embedding(table, **arguments)
    expected = resize_position_embedding(table.float(), **arguments).bfloat16()
    assert resized.dtype == torch.bfloat16
    assert torch.equal(resized, expected)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"old_grid": (3, 5)}, ValueError, r"expected \[1, 1 \+ 3 \* 5, d\].*pass the grid it was"),
        ({"num_prefix": 2}, ValueError, r"\[1, 2 \+ 3 \* 4, d\].* got \(1, 13, 2\)"),
        ({"embedding": torch.zeros(13, 2)}, ValueError, r"got \(13, 2\)"),
        ({"new_grid": (0, 4)}, ValueError, "new_grid: expected at least 1, got 0"),
        ({"new_grid": (2.0, 4)}, TypeError, "new_grid: expected an integer, got 2.0"),
        ({"old_grid": (12,)}, ValueError, r"old_grid: expected \(height, width\), got \(12,\)"),
        ({"mode": "nearest"}, ValueError, "mode: expected one of 'bilinear', 'bicubic'"),
    ],
)
def test_resize_says_what_is_wrong(change, error, text):
    arguments = {
        "embedding": torch.zeros(1, 13, 2),
        "old_grid": (3, 4),
        "new_grid": (3, 4),
        "num_prefix": 1,
        **change,
    }
    with pytest.raises(error, match=text):
        resize_position_embedding(arguments.pop("embedding"), **arguments)


def test_sine_position_of_a_2x3_grid_by_hand():
    """d = 8: per axis frequencies 1 and 1 / 100, sin and cos of each, y first."""
    row = {i: 2 * math.pi * i / (2 + 1e-6) for i in (1, 2)}
    column = {j: 2 * math.pi * j / (3 + 1e-6) for j in (1, 2, 3)}

    def features(angle):
        return [math.sin(angle), math.cos(angle), math.sin(angle / 100), math.cos(angle / 100)]

    expected = [features(row[i]) + features(column[j]) for i in (1, 2) for j in (1, 2, 3)]
    actual = sine_position((2, 3), 8, dtype=torch.float64)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


@settings(max_examples=20, deadline=None)
@given(grid=GRIDS, quarter=st.integers(1, 8))
def test_transposing_the_grid_swaps_the_halves(grid, quarter):
    channels = 4 * quarter
    there = sine_position(grid, channels).view(*grid, channels)
    back = sine_position(grid[::-1], channels).view(*grid[::-1], channels)
    swapped = torch.cat([there[..., channels // 2 :], there[..., : channels // 2]], dim=-1)
    assert torch.equal(back, swapped.transpose(0, 1))


def test_pyramid_position_adds_one_vector_per_level():
    shapes, vectors = [(2, 3), (1, 1)], torch.randn(2, 8)
    position = pyramid_position(shapes, vectors)
    torch.testing.assert_close(position[:6], sine_position((2, 3), 8) + vectors[0])
    torch.testing.assert_close(position[6:], sine_position((1, 1), 8) + vectors[1])


@needs_shared
def test_stored_positions():
    folder = SHARED / "goldens" / "dev"
    tensors = load_file(folder / "unept_context_branch.safetensors")
    weights = load_file(folder / "unept_context_branch.weights.safetensors")
    shapes = [tuple(tensors[f"input.feature{level}"].shape[-2:]) for level in range(3)]
    position = pyramid_position(shapes, weights["level_embed"].float())
    torch.testing.assert_close(position, tensors["output.pos"][0], rtol=0, atol=1e-6)


def test_cell_centres_are_row_major_and_x_first():
    expected = [
        (0.25, 1 / 6),
        (0.75, 1 / 6),
        (0.25, 0.5),
        (0.75, 0.5),
        (0.25, 5 / 6),
        (0.75, 5 / 6),
    ]
    torch.testing.assert_close(cell_centres((3, 2)), torch.tensor(expected))
    assert torch.equal(cell_centres((1, 1)), torch.tensor([[0.5, 0.5]]))


def test_grid_embedding_is_a_table_with_a_gradient_on_any_grid():
    table = GridEmbedding(grid=(3, 4), channels=6)
    assert sum(p.numel() for p in table.parameters()) == 72
    assert list(table.state_dict()) == ["weight"]
    assert torch.equal(table((3, 4))[0], table.weight)
    resized = table((5, 2))
    assert resized.shape == (1, 10, 6)
    resized.sum().backward()
    # Every output is a mean of cells with weights that sum to 1.
    torch.testing.assert_close(table.weight.grad.sum(0), torch.full((6,), 10.0))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: sine_position((2, 2), 6), ValueError, "multiple of 4 .* got 6; use 8"),
        (lambda: sine_position((2, 0), 8), ValueError, "grid: expected at least 1, got 0"),
        (lambda: cell_centres((2, -1)), ValueError, "grid: expected at least 1, got -1"),
        (
            lambda: pyramid_position([(2, 2)], torch.zeros(2, 8)),
            ValueError,
            r"level_embedding: expected \[1, d\].* got \(2, 8\)",
        ),
        (lambda: GridEmbedding(grid=(2, 2), channels=0), ValueError, "channels: expected at least"),
    ],
)
def test_positions_say_what_is_wrong(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.slow
def test_positions_compile():
    vectors = torch.randn(2, 8)

    def positions(vectors, table):
        resized = resize_position_embedding(table, old_grid=(2, 2), new_grid=(3, 3), num_prefix=1)
        return pyramid_position([(2, 3), (1, 1)], vectors), cell_centres((2, 3)), resized

    arguments = vectors, torch.randn(1, 5, 8)
    compiled = torch.compile(positions, fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), positions(*arguments))
