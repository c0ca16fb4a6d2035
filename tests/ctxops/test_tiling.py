"""Geometry of tiled windows: everything is covered once, nothing that is written overlaps."""

import pytest
import torch

from ctxops.tiling import tilings

CASES = [
    ((2, 3), (5, 29), 5, 2, 1),
    ((1, 1), (7, 50), 5, 1, 2),
    ((3, 2), (1, 1), 3, 1, 3),
    ((1, 2), (4, 31), 9, 1, 1),
]


def regions(case):
    (batch, channels), (height, width), size, scale, stride = case
    x = torch.empty(batch, channels, height * stride, width * stride)
    kernels = torch.empty(batch, size**2, scale**2, height, width)
    return list(tilings(x, kernels, stride))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("max_tiles", [1, 3, 1000])
def test_chunks_cover_every_output_and_kernel_once(case, max_tiles):
    (batch, channels), (height, width), size, scale, _ = case
    outputs = torch.zeros(batch, channels, height * scale, width * scale)
    kernels = torch.zeros(batch, size**2, scale**2, height, width)
    for region in regions(case):
        for tiles in region.chunks(max_tiles):
            assert tiles.count <= max(max_tiles, tiles.columns)
            tiles.outputs_of(outputs).add_(1)
            tiles.kernels_of(kernels).add_(1)
    assert torch.equal(outputs, torch.ones_like(outputs))
    assert torch.equal(kernels, torch.ones_like(kernels))


@pytest.mark.parametrize("case", CASES)
def test_taps_of_a_band_are_distinct_places(case):
    for tiles in regions(case):
        pixels, outputs = tiles.band_shape
        band = torch.arange(tiles.count * pixels * outputs).view(tiles.count, pixels, outputs)
        taps = tiles.taps_of(band)
        assert taps.unique().numel() == taps.numel()


@pytest.mark.parametrize("case", CASES)
def test_patches_added_together_do_not_overlap(case):
    (batch, channels), (height, width), size, _, stride = case
    shape = batch, channels, (height - 1) * stride + size, (width - 1) * stride + size
    places = torch.arange(torch.Size(shape).numel()).view(shape)
    for tiles in regions(case):
        patches = tiles.patches_of(places)
        taken = torch.zeros(patches.shape[1:3])
        for rows, columns in tiles.disjoint_parts():
            together = patches[:, rows, columns]
            assert together.unique().numel() == together.numel()
            taken[rows, columns] += 1
        assert torch.equal(taken, torch.ones_like(taken))
