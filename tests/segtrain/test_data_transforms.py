import colorsys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from segtrain.data.dataset import generator_of
from segtrain.data.datasets.lip import FLIP_PAIRS
from segtrain.data.transforms import (
    NORMALISATIONS,
    EvalImage,
    TrainTransform,
    choose_crop,
    distort_colours,
    normalise,
    rescale,
    swap_pairs,
    target_size,
)


def pair(height, width, *, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (3, height, width), np.uint8)
    return torch.from_numpy(image), torch.from_numpy(
        rng.integers(0, classes, (height, width), np.uint8)
    )


def plain(**changes):
    keys = {"crop": (8, 10), "base_size": (12, 9), "scale": (1.0, 1.0), "flip": 0.0}
    return TrainTransform(**{**keys, "photometric": False, "cat_max_ratio": 1.0, **changes})


@pytest.mark.parametrize(
    ("size", "base", "ratio", "expected"),
    [
        ((360, 480), (1440, 360), 1.0, (360, 480)),
        ((512, 683), (2048, 512), 0.5, (256, 342)),  # 341.5 rounds up
        ((100, 1000), (400, 100), 1.0, (40, 400)),  # the long side binds
        ((1000, 100), (400, 100), 1.0, (400, 40)),
        ((1024, 2048), (2048, 1024), 1.999, (2046, 4092)),  # sides of the box are cut
        ((3, 300), (30, 30), 0.5, (1, 15)),  # never empty
    ],
)
def test_target_size(size, base, ratio, expected):
    assert target_size(size, base, ratio) == expected


def test_short_sides_are_drawn_in_place_of_a_scale():
    transform = plain(short_sides=(6, 9, 12), base_size=(30, 9), crop=(40, 40), scale=(0.5, 2.0))
    seen = []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        _, label = transform.cut(*pair(20, 30), generator)
        seen.append(tuple(label.shape))
    assert set(seen) == {(6, 9), (9, 14), (12, 18)}
    assert min(seen.count(size) for size in set(seen)) > 10
    # The long side stays within the box.
    generator = torch.Generator().manual_seed(0)
    assert (
        max(plain(short_sides=(12,), base_size=(15, 9)).cut(*pair(20, 30), generator)[1].shape) < 16
    )


def test_rescaled_labels_stay_under_their_pixels():
    # A map whose image is its label: the nearest value must be within half a step of the bilinear.
    ramp = torch.arange(24, dtype=torch.uint8).mul(10)[None].expand(5, 24).contiguous()
    image, label = rescale(ramp.expand(3, 5, 24), ramp, (7, 61))
    assert image.shape[1:] == label.shape == (7, 61)
    difference = image[0].int() - label.int()
    assert difference.abs().max() <= 5
    assert abs(difference.float().mean().item()) < 0.5


def test_rescale_matches_a_bilinear_loop():
    image, label = pair(5, 7)
    big, _ = rescale(image, label, (8, 11))
    expected = np.zeros((8, 11))
    for y in range(8):
        for x in range(11):
            sy, sx = max((y + 0.5) * 5 / 8 - 0.5, 0), max((x + 0.5) * 7 / 11 - 0.5, 0)
            y0, x0 = int(sy), int(sx)
            y1, x1 = min(y0 + 1, 4), min(x0 + 1, 6)
            fy, fx = sy - y0, sx - x0
            corner = image[0].double().numpy()
            top = corner[y0, x0] * (1 - fx) + corner[y0, x1] * fx
            low = corner[y1, x0] * (1 - fx) + corner[y1, x1] * fx
            expected[y, x] = top * (1 - fy) + low * fy
    assert np.abs(big[0].numpy() - expected).max() <= 1.0  # bytes are rounded


def test_small_images_are_padded_right_and_below_after_normalisation():
    image, label = pair(6, 6)
    crop, labels = plain(base_size=(6, 6))(image, label, torch.Generator())
    assert crop.shape == (3, 8, 10)
    assert (crop.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert torch.equal(crop[:, :6, :6], normalise(image, *NORMALISATIONS["vit"]))
    assert torch.equal(labels[:6, :6], label.long())
    outside = torch.ones(8, 10, dtype=torch.bool)
    outside[:6, :6] = False
    assert (crop[:, outside] == 0).all()
    assert (labels[outside] == 255).all()


def test_normalise_by_hand():
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1)
    mean, std = NORMALISATIONS["imagenet"]
    expected = [(v - m) / s for v, m, s in zip((0, 0.2, 1), mean, std, strict=True)]
    assert normalise(image, mean, std).flatten().tolist() == pytest.approx(expected, rel=1e-6)


def test_eval_image_keeps_every_pixel():
    image, label = pair(5, 1)
    out, labels = EvalImage()(image, label, torch.Generator())
    assert torch.equal((out * 0.5 + 0.5).mul(255).round().byte(), image)
    assert torch.equal(labels, label.long())


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 50))
def test_crops_of_any_size(height, width, seed):
    image, label = pair(height, width, seed=seed)
    transform = TrainTransform(crop=(8, 10), base_size=(24, 12))
    crop, labels = transform(image, label, generator_of(seed))
    assert crop.shape == (3, 8, 10)
    assert labels.shape == (8, 10)
    assert crop.isfinite().all()
    assert set(labels.unique().tolist()) <= {0, 1, 2, 3, 255}


def test_flip_mirrors_image_and_label_together():
    image, label = pair(9, 12)
    transform = plain(crop=(9, 12))
    flipped = plain(crop=(9, 12), flip=1.0)
    straight, mirrored = (
        transform(image, label, torch.Generator()),
        flipped(image, label, torch.Generator()),
    )
    assert torch.equal(mirrored[0], straight[0].flip(-1))
    assert torch.equal(mirrored[1], straight[1].flip(-1))


def test_lip_flip_exchanges_left_and_right():
    image, _ = pair(9, 12)
    label = torch.arange(20, dtype=torch.uint8).repeat(6)[:108].view(9, 12)
    transform = plain(crop=(9, 12), flip=1.0, flip_pairs=FLIP_PAIRS)
    _, mirrored = transform(image, label, torch.Generator())
    names = list(range(20))
    names[14:20] = [15, 14, 17, 16, 19, 18]
    assert mirrored.flip(-1).tolist() == [[names[v] for v in row] for row in label.tolist()]


def test_swapping_twice_is_the_identity():
    label = torch.arange(256, dtype=torch.uint8).view(16, 16)
    once = swap_pairs(label, FLIP_PAIRS)
    assert torch.equal(swap_pairs(once, FLIP_PAIRS), label)
    assert (once != label).sum() == 6


def test_crop_avoids_a_dominating_class():
    # Only crops over the right border have two classes; one in 25 places has half of each.
    label = torch.zeros(8, 40, dtype=torch.uint8)
    label[:, 20:] = 1
    hits = {True: 0, False: 0}
    for seed in range(200):
        for ratio in (0.75, 1.0):
            _, left, _, width = choose_crop(label, (8, 8), ratio, generator_of(seed))
            share = label[:, left : left + width].float().mean().item()
            hits[ratio < 1] += 0.25 < share < 0.75
    # 3 of 33 places are varied enough; after ten rejections the eleventh is taken unseen.
    assert 0.05 < hits[False] / 200 < 0.15
    assert hits[True] / 200 == pytest.approx(1 - (30 / 33) ** 11, abs=0.08)


def test_ignored_pixels_do_not_count_as_a_class():
    label = torch.full((8, 9), 255, dtype=torch.uint8)
    label[:, 0] = 1
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    choose_crop(label, (8, 8), 0.75, generator)
    # Eleven draws of two numbers: no crop satisfied the rule.
    other = torch.Generator()
    other.set_state(before)
    for _ in range(11):
        torch.randint(1, (), generator=other)
        torch.randint(2, (), generator=other)
    assert torch.equal(generator.get_state(), other.get_state())


def test_large_crops_are_cut_to_the_image():
    label = torch.zeros(3, 1, dtype=torch.uint8)
    assert choose_crop(label, (8, 8), 1.0, torch.Generator()) == (0, 0, 3, 1)


class Script:
    """Answers draws from a list, so that one branch of the distortion can be looked at."""

    def __init__(self, monkeypatch, *, chances, uniforms=(), integers=()):
        from segtrain.data import transforms

        chances, uniforms, integers = map(iter, (chances, uniforms, integers))
        monkeypatch.setattr(transforms, "_chance", lambda p, g: next(chances))
        monkeypatch.setattr(transforms, "_uniform", lambda a, b, g: next(uniforms))
        monkeypatch.setattr(transforms, "_below", lambda n, g: next(integers))


@pytest.mark.parametrize(
    ("chances", "uniforms", "expected"),
    [
        # brightness, contrast first?, contrast, saturation, hue
        ((True, True, False, False, False), (20.7,), [20, 120, 220, 255]),
        ((True, True, False, False, False), (-20.7,), [0, 79, 179, 234]),
        ((False, True, True, False, False), (1.5,), [0, 150, 255, 255]),
        ((True, True, True, False, False), (20.0, 0.5), [10, 60, 110, 127]),
        # contrast behind the others: its chance is the last to be drawn
        ((True, False, False, False, True), (20.0, 0.5), [10, 60, 110, 127]),
        # grey has no saturation and no hue
        ((False, False, True, True, False), (1.5,), [0, 100, 200, 255]),
    ],
)
def test_brightness_and_contrast_on_bytes(monkeypatch, chances, uniforms, expected):
    Script(monkeypatch, chances=chances, uniforms=uniforms, integers=(30,))
    image = torch.tensor([0, 100, 200, 255], dtype=torch.uint8).view(1, 1, 4).expand(3, 1, 4)
    assert distort_colours(image, torch.Generator())[0, 0].tolist() == expected


@pytest.mark.parametrize("turn", [10, -18])
def test_hue_and_saturation_are_those_of_hsv(monkeypatch, turn):
    rng = np.random.default_rng(1)
    pixels = rng.integers(40, 216, (3, 6, 6), np.uint8)
    # no brightness, contrast last and off; saturation x 0.8, hue + turn of 180
    Script(
        monkeypatch,
        chances=(False, False, True, True, False),
        uniforms=(0.8,),
        integers=(18 + turn,),
    )
    changed = distort_colours(torch.from_numpy(pixels), torch.Generator()).numpy()
    for y in range(6):
        for x in range(6):
            hue, saturation, value = colorsys.rgb_to_hsv(*(pixels[:, y, x] / 255))
            expected = colorsys.hsv_to_rgb((hue + turn / 180) % 1, saturation * 0.8, value)
            # Hues of two degrees and saturations of a byte: a few values of rounding.
            assert np.abs(changed[:, y, x] - np.array(expected) * 255).max() <= 5


def test_distortion_draws_from_its_generator_only():
    image, _ = pair(6, 7)
    state = torch.get_rng_state()
    first, second, other = (distort_colours(image, generator_of(s)) for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_non_contiguous_images():
    image, label = pair(12, 12)
    transform = TrainTransform(crop=(8, 8), base_size=(24, 12))
    strided = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    a, b = (transform(i, label, generator_of(3)) for i in (image, strided))
    assert torch.equal(a[0], b[0])
    assert a[0].is_contiguous()
    assert b[0].is_contiguous()
