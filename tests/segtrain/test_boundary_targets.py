"""Boundary and direction targets against brute force, stored numbers, and flips."""

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from ctxops.boundary import bin_of_angle, flip_bins
from segtrain.data import boundary
from segtrain.data.boundary import (
    bin_of_gradient,
    boundary_targets,
    distance_inside,
    gradient,
)
from tests.oracles import boundary as oracle
from tests.shared_data import SHARED, needs_shared

pytest.importorskip("cv2", reason="the targets need OpenCV: pip install 'ctxseg[seg]'")

SIZES = [(9, 14), (1, 1), (1, 12), (13, 1), (7, 7)]


def scene(height, width, *, seed=0, regions=4, void=True):
    """Regions nearest to random points, with a rectangle of void."""
    rng = np.random.default_rng(seed)
    points = rng.random((regions, 2)) * [height, width]
    y, x = np.mgrid[:height, :width]
    distances = [(y - row) ** 2 + (x - column) ** 2 for row, column in points]
    labels = np.argmin(distances, axis=0).astype(np.uint8)
    if void:
        labels[height // 3 : height // 2, width // 4 : width // 2] = 255
    return labels


@pytest.mark.parametrize("max_distance", [1, 2, 5])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", SIZES)
def test_equals_brute_force(size, seed, max_distance):
    labels = scene(*size, seed=seed, regions=2)
    if (labels == labels[0, 0]).all():
        labels[0, 0] = 255  # brute force knows no distance without an outside
    targets = boundary_targets(labels, max_distance=max_distance, min_area=1)
    is_boundary, direction, length = oracle.targets(labels, max_distance=max_distance)
    for y, x in np.ndindex(labels.shape):
        if labels[y, x] == 255:
            assert targets.boundary[y, x] == targets.direction[y, x] == 255
            continue
        assert targets.boundary[y, x] == is_boundary[y, x]
        if length[y, x] < boundary.MIN_GRADIENT:
            assert targets.direction[y, x] == 255
        else:
            assert targets.direction[y, x] == direction[y, x]


@needs_shared
@pytest.mark.parametrize("case", ["ade20k", "cityscapes"])
def test_stored_numbers(case):
    tensors = load_file(SHARED / "goldens" / "dev" / f"unept_boundary_{case}.safetensors")
    labels = tensors["input.label"]
    targets = boundary_targets(labels)
    small = [c for c in np.unique(labels) if c != 255 and (labels == c).sum() < 100]
    ignored = (labels == 255) | np.isin(labels, small)
    assert small
    assert np.array_equal(targets.boundary == 255, ignored)
    assert np.array_equal(targets.boundary[~ignored], tensors["output.boundary"][~ignored])
    stable = (tensors["output.stable"] == 1) & ~ignored
    for name in ("direction_bin", "direction_bin_exact"):
        assert np.array_equal(targets.direction[stable], tensors[f"output.{name}"][stable])


@needs_shared
@pytest.mark.parametrize("case", ["ade20k", "cityscapes"])
def test_stored_distances_and_gradients(case):
    tensors = load_file(SHARED / "goldens" / "dev" / f"unept_boundary_{case}.safetensors")
    labels = tensors["input.label"]
    used = [c for c in np.unique(labels) if c != 255 and (labels == c).sum() >= 100]
    for label in used:
        mask = labels == label
        distance = distance_inside(mask)
        expected = tensors["output.depth_exact"][mask]
        np.testing.assert_allclose(distance[mask], expected, rtol=0, atol=1e-4)
        actual = np.stack(gradient(distance))[:, mask]
        expected = tensors["output.gradient"][:, mask]
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-3)


def test_a_vertical_border():
    """Right of it the interior is right, left of it left; the band is five pixels on each side."""
    labels = np.zeros((20, 24), np.uint8)
    labels[:, 12:] = 1
    targets = boundary_targets(labels)
    middle = targets.boundary[10].tolist()
    assert middle == [0] * 7 + [1] * 10 + [0] * 7
    assert targets.direction[10, 7:12].tolist() == [0] * 5
    assert targets.direction[10, 12:17].tolist() == [4] * 5
    assert distance_inside(labels == 1)[10, 12:].tolist() == list(range(1, 13))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    regions=st.integers(1, 6),
    axis=st.sampled_from(["horizontal", "vertical"]),
)
def test_flipping_before_equals_flipping_behind(seed, height, width, regions, axis):
    labels = scene(height, width, seed=seed, regions=regions)
    number = {"vertical": 0, "horizontal": 1}[axis]
    before = boundary_targets(np.flip(labels, number), min_area=1)
    behind = boundary_targets(labels, min_area=1)
    assert np.array_equal(before.boundary, np.flip(behind.boundary, number))
    mapped = flip_bins(torch.from_numpy(np.flip(behind.direction, number).copy()), axis).numpy()
    # Sums run in another order: a gradient on the edge of a bin, or of vanishing, may tip over.
    assert (before.direction != mapped).sum() <= 2


def test_boxes_change_nothing(monkeypatch):
    labels = scene(61, 83, regions=12)
    boxed = boundary_targets(labels)
    monkeypatch.setattr(boundary, "_grown_box", lambda mask: (slice(None), slice(None)))
    whole = boundary_targets(labels)
    assert np.array_equal(boxed.boundary, whole.boundary)
    assert np.array_equal(boxed.direction, whole.direction)


@pytest.mark.parametrize("place", [(0, 0), (0, 9), (9, 0), (9, 9), (4, 5)])
def test_a_class_at_the_border_of_the_crop(place):
    """The crop's border is no boundary, but the pixel beside the class is outside."""
    labels = np.zeros((10, 10), np.uint8)
    labels[place] = 1
    targets = boundary_targets(labels, min_area=1, max_distance=1)
    y, x = np.mgrid[:10, :10]
    near = np.maximum(abs(y - place[0]), abs(x - place[1])) <= 1  # below 2 pixels, diagonals too
    assert np.array_equal(targets.boundary.astype(bool), near)


def test_a_class_that_fills_the_crop_has_no_boundary():
    targets = boundary_targets(np.full((12, 15), 3, np.uint8))
    assert (targets.boundary == 0).all()
    assert (targets.direction[2:-2, 2:-2] == 255).all()
    assert (distance_inside(np.ones((3, 4), bool)) == 250).all()


def test_small_classes_are_ignored_but_have_borders():
    labels = np.zeros((20, 20), np.uint8)
    labels[8:12, 8:12] = 1
    targets = boundary_targets(labels, min_area=17)
    assert (targets.boundary[labels == 1] == 255).all()
    assert (targets.direction[labels == 1] == 255).all()
    assert targets.boundary[8, 7] == 1
    assert boundary_targets(labels, min_area=16).boundary[9, 9] == 1


@pytest.mark.parametrize("min_area", [0, 100])
def test_nothing_but_void(min_area):
    targets = boundary_targets(np.full((5, 6), 255, np.uint8), min_area=min_area)
    assert (targets.boundary == 255).all()
    assert (targets.direction == 255).all()


def test_another_void_label():
    labels = scene(20, 30)
    moved = labels.astype(np.int64)
    moved[labels == 255] = 7
    expected = boundary_targets(labels, min_area=1)
    actual = boundary_targets(moved, min_area=1, ignore_index=7)
    assert np.array_equal(actual.boundary, expected.boundary)
    assert np.array_equal(actual.direction, expected.direction)


@pytest.mark.parametrize("layout", ["transposed", "flipped", "sliced", "read-only", "int64"])
def test_memory_layout_does_not_matter(layout):
    labels = scene(20, 31)
    expected = boundary_targets(labels, min_area=1)
    laid_out = {
        "transposed": labels.T.copy().T,
        "flipped": labels[:, ::-1].copy()[:, ::-1],
        "sliced": np.pad(labels, 3)[3:-3, 3:-3],
        "read-only": labels.copy(),
        "int64": labels.astype(np.int64),
    }[layout]
    laid_out.flags.writeable = layout != "read-only"
    actual = boundary_targets(laid_out, min_area=1)
    assert np.array_equal(actual.boundary, expected.boundary)
    assert np.array_equal(actual.direction, expected.direction)
    assert actual.boundary.dtype == actual.direction.dtype == np.uint8


def test_labels_stay_as_they_are():
    labels = scene(20, 31)
    copy = labels.copy()
    boundary_targets(labels)
    assert np.array_equal(labels, copy)


def test_bins_are_those_of_the_operations():
    angle = np.arange(-179.95, 180, 0.1)
    gy, gx = np.sin(np.radians(angle)), np.cos(np.radians(angle))
    actual = bin_of_gradient(gy.astype(np.float32), gx.astype(np.float32))
    assert np.array_equal(actual, bin_of_angle(torch.from_numpy(angle)).numpy())
    assert bin_of_gradient(np.float32([-0.0, 0, 1e-4]), np.float32([-1, -1, 0])).tolist() == [
        0,
        0,
        255,
    ]


def test_the_gradient_weighs_near_pixels_more():
    distance = np.zeros((5, 5), np.float32)
    distance[2, 3], distance[0, 2] = 3, 8
    gy, gx = gradient(distance)
    assert gx[2, 2] == pytest.approx(3)
    assert gy[2, 2] == pytest.approx(8 * -2 / 4)
    assert math.isclose(gradient(distance)[1][2, 1], 3 * 2 / 4 + 8 * 1 / 5, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("labels", "options", "error", "text"),
    [
        (np.zeros((4, 4)), {}, TypeError, "labels: expected an integer array .* got float64"),
        ([[0, 1]], {}, TypeError, "got list; use np.asarray"),
        (np.zeros((1, 4, 4), int), {}, ValueError, r"got shape \(1, 4, 4\); drop a channel"),
        (np.zeros((0, 4), int), {}, ValueError, "labels: expected a non-empty crop"),
        (np.full((4, 4), -1), {}, ValueError, "expected none below 0, got -1; make void 255"),
        (np.zeros((4, 4), int), {"max_distance": 0}, ValueError, "at least 1 and 0, got 0 and 100"),
        (np.zeros((4, 4), int), {"min_area": -1}, ValueError, "got 5 and -1; 5 and 100 are"),
    ],
)
def test_says_what_is_wrong(labels, options, error, text):
    with pytest.raises(error, match=text):
        boundary_targets(labels, **options)


def test_says_how_to_get_opencv(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ctxseg\[seg\]'"):
        boundary_targets(scene(12, 12))
