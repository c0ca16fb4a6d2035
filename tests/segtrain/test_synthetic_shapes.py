import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segtrain.data.synthetic import textures
from segtrain.data.synthetic.categories import THINGS
from segtrain.data.synthetic.color import lch_to_rgb, rgb_to_lab
from segtrain.data.synthetic.shapes import (
    SHAPE_NAMES,
    draw_patch,
    ellipse_distance,
    polygon_distance,
)


def patch(name, *, radius=20.0, aspect=1.0, angle=0.0, shift=(0.0, 0.0), margin=0):
    return draw_patch(
        name=name,
        radius=radius,
        aspect=aspect,
        angle=angle,
        hole=0.5,
        shift=shift,
        margin=margin,
    )


def slow_polygon_distance(px, py, vertices):
    """Distance to the nearest edge, sign by the sum of the angles seen from the point."""
    nearest, turned = math.inf, 0.0
    for k in range(len(vertices)):
        ax, ay = (float(v) for v in vertices[k])
        bx, by = (float(v) for v in vertices[(k + 1) % len(vertices)])
        t = ((px - ax) * (bx - ax) + (py - ay) * (by - ay)) / ((bx - ax) ** 2 + (by - ay) ** 2)
        t = min(max(t, 0.0), 1.0)
        nearest = min(nearest, math.hypot(px - ax - t * (bx - ax), py - ay - t * (by - ay)))
        cross = (ax - px) * (by - py) - (ay - py) * (bx - px)
        dot = (ax - px) * (bx - px) + (ay - py) * (by - py)
        turned += math.atan2(cross, dot)
    return -nearest if abs(turned) > math.pi else nearest


@pytest.mark.parametrize("clockwise", [True, False])
def test_polygon_distance_agrees_with_a_loop(clockwise):
    corners = np.array([[-4.3, -3.1], [3.7, -4.2], [1.1, 0.3], [4.1, 3.9], [-2.2, 2.6]])
    if not clockwise:
        corners = corners[::-1]
    y, x = np.mgrid[-6:7, -7:6].astype(np.float32)
    found = polygon_distance(x, y, corners)
    expected = [[slow_polygon_distance(c, r, corners) for c in x[0]] for r in y[:, 0]]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_ellipse_distance_is_exact_for_a_circle_and_zero_on_any_ellipse():
    y, x = np.mgrid[-9:10, -9:10].astype(np.float32)
    np.testing.assert_allclose(ellipse_distance(x, y, 5.0, 5.0), np.hypot(x, y) - 5.0, atol=1e-5)
    t = np.linspace(0, 2 * np.pi, 50, dtype=np.float32)
    on_line = ellipse_distance(7 * np.cos(t), 3 * np.sin(t), 7.0, 3.0)
    np.testing.assert_allclose(on_line, 0.0, atol=1e-5)


def rounded_area(area, perimeter):
    """Area of a unit polygon shrunk by 7 % and grown back with round corners (Steiner)."""
    return 0.93**2 * area + 0.07 * 0.93 * perimeter + math.pi * 0.07**2


STAR_EDGE = math.sqrt(1 + 0.46**2 - 2 * 0.46 * math.cos(math.pi / 5))


@pytest.mark.parametrize(
    ("name", "area"),
    [
        ("disc", math.pi),
        ("ring", math.pi * 0.75),
        ("triangle", rounded_area(0.75 * math.sqrt(3), 3 * math.sqrt(3))),
        ("square", rounded_area(2.0, 4 * math.sqrt(2))),
        ("star", rounded_area(5 * 0.46 * math.sin(math.pi / 5), 10 * STAR_EDGE)),
        ("cross", rounded_area(8 * 0.95 * 0.33 - 4 * 0.33**2, 8 * 0.95)),
    ],
)
def test_areas_match_geometry(name, area):
    found = np.count_nonzero(patch(name, radius=100.0).mask) / 100.0**2
    assert found == pytest.approx(area, rel=0.01)  # inner corners grow a little less


def test_every_thing_class_has_a_shape_and_shapes_differ():
    assert set(SHAPE_NAMES) == {c.name for c in THINGS}
    masks = [patch(name).mask for name in SHAPE_NAMES]
    for k, first in enumerate(masks):
        for second in masks[k + 1 :]:
            union = np.count_nonzero(first | second)
            assert np.count_nonzero(first & second) < 0.8 * union


def test_ring_is_open_in_the_middle_and_disc_is_not():
    ring, disc = patch("ring").mask, patch("disc").mask
    middle = ring.shape[0] // 2
    assert not ring[middle, middle]
    assert disc[middle, middle]


@pytest.mark.parametrize("name", SHAPE_NAMES)
def test_patch_holds_the_shape_and_its_margin_at_any_pose(name):
    for angle in (0.0, 0.4, 1.1, 2.9):
        found = patch(name, radius=9.5, aspect=0.72, angle=angle, shift=(0.5, -0.5), margin=3)
        inner = np.zeros_like(found.mask)
        inner[3:-3, 3:-3] = True
        assert found.mask.any()
        assert not (found.mask & ~inner).any()
        assert found.distance.dtype == np.float32


def test_rotation_by_a_quarter_turn_turns_the_mask():
    straight = patch("triangle", aspect=0.8).mask
    turned = patch("triangle", aspect=0.8, angle=math.pi / 2).mask
    assert np.mean(turned != np.rot90(straight, -1)) < 0.005


def test_unknown_shape_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown shape 'blob'; use one of disc, ring"):
        patch("blob")


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), height=st.integers(1, 9), width=st.integers(1, 9))
def test_noise_stays_in_range(seed, height, width):
    rng = np.random.default_rng(seed)
    ys = np.linspace(-2.0, 3.0, height, dtype=np.float32)
    xs = np.linspace(5.0, 5.5, width, dtype=np.float32)
    field = textures.octaves(rng, ys, xs, 3)
    assert field.shape == (height, width)
    assert field.dtype == np.float32
    assert 0.0 <= field.min() <= field.max() <= 1.0


def test_noise_is_continuous():
    ys = np.arange(0, 4, 0.01, dtype=np.float32)
    field = textures.value_noise(np.random.default_rng(0), ys, ys)
    assert max(np.abs(np.diff(field, axis=axis)).max() for axis in (0, 1)) < 0.016


def test_patterns_repeat_and_stay_in_range():
    y, x = np.mgrid[0:3:0.1, 0:3:0.1].astype(np.float32)
    for pattern in (textures.dots, textures.checks):
        field = pattern(y, x)
        assert 0.0 <= field.min() < 0.1 < 0.9 < field.max() <= 1.0
        np.testing.assert_allclose(field, pattern(y + 1.0, x + 2.0), atol=1e-3)
    lines = textures.joints(y + 0.5, x + 0.5, width_y=0.1, width_x=0.1)
    assert lines[0, 0] == 0.0
    assert lines[5, 0] == 1.0


def test_colors_convert_there_and_back_inside_the_gamut():
    np.testing.assert_allclose(lch_to_rgb((1.0, 0.0, 0.0)), 1.0, atol=1e-3)
    for lightness, hue in [(0.3, 20.0), (0.6, 140.0), (0.8, 250.0)]:
        lab = rgb_to_lab(lch_to_rgb((lightness, 0.04, hue)))
        turn = np.deg2rad(hue)
        expected = [lightness, 0.04 * np.cos(turn), 0.04 * np.sin(turn)]
        np.testing.assert_allclose(lab, expected, atol=1e-3)


def test_colors_outside_the_gamut_keep_lightness_and_hue():
    for hue in range(0, 360, 30):
        lightness, a, b = rgb_to_lab(lch_to_rgb((0.7, 0.3, float(hue))))
        assert lightness == pytest.approx(0.7, abs=0.01)
        assert np.cos(np.arctan2(b, a) - np.deg2rad(hue)) > 0.995
