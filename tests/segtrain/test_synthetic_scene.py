import numpy as np
import pytest

from segtrain.data.synthetic import CATEGORIES, STUFF, THINGS, generate_scene
from segtrain.data.synthetic import paint as paint_module
from segtrain.data.synthetic import scene as scene_module
from segtrain.data.synthetic.background import draw_background
from segtrain.data.synthetic.clutter import draw_clutter
from segtrain.data.synthetic.layout import (
    MIN_VISIBLE_AREA,
    MIN_VISIBLE_SHARE,
    NUM_THINGS,
    clip_window,
    place_things,
)

SIZES = [(256, 256), (97, 64), (64, 97), (33, 200), (32, 32)]


@pytest.fixture(scope="module")
def scenes():
    return [generate_scene(seed=5, index=k, size=size) for size in SIZES for k in range(6)]


def test_a_scene_depends_on_seed_index_and_size_alone():
    first = generate_scene(seed=3, index=4, size=(96, 64))
    generate_scene(seed=9, index=1, size=(64, 64))
    np.random.seed(0)  # noqa: NPY002 - the global stream must not matter
    again = generate_scene(seed=3, index=4, size=(96, 64))
    for field in ("image", "semantic", "instance"):
        assert np.array_equal(getattr(first, field), getattr(again, field))
    assert first.objects == again.objects
    for other in ({"seed": 4}, {"index": 5}):
        changed = generate_scene(**{"seed": 3, "index": 4, "size": (96, 64)} | other)
        assert not np.array_equal(first.image, changed.image)


def test_shapes_and_types(scenes):
    for k, scene in enumerate(scenes):
        width, height = SIZES[k // 6]
        assert scene.image.shape == (height, width, 3)
        assert scene.semantic.shape == scene.instance.shape == (height, width)
        assert {a.dtype for a in (scene.image, scene.semantic, scene.instance)} == {np.dtype("u1")}


def test_objects_describe_the_instance_map_exactly(scenes):
    for scene in scenes:
        found = set(np.unique(scene.instance)) - {0}
        assert found == {thing.instance_id for thing in scene.objects}
        assert 1 <= len(scene.objects) <= NUM_THINGS[1]
        for thing in scene.objects:
            mask = scene.instance == thing.instance_id
            rows, columns = np.nonzero(mask)
            x, y, w, h = thing.bbox
            assert (x, y) == (columns.min(), rows.min())
            assert (x + w - 1, y + h - 1) == (columns.max(), rows.max())
            assert thing.area == np.count_nonzero(mask)
            assert np.all(scene.semantic[mask] == thing.category_id)


def test_every_thing_is_visible_enough(scenes):
    for scene in scenes:
        for thing in scene.objects:
            assert thing.area >= MIN_VISIBLE_AREA
            assert thing.area >= MIN_VISIBLE_SHARE * thing.full_area
            assert thing.area <= thing.full_area


def test_thing_classes_are_exactly_where_instances_are(scenes):
    things, stuff = [c.id for c in THINGS], [c.id for c in STUFF]
    for scene in scenes:
        assert np.array_equal(np.isin(scene.semantic, things), scene.instance > 0)
        assert np.all(np.isin(scene.semantic[scene.instance == 0], stuff))


def test_every_painted_thing_is_annotated(monkeypatch):
    painted = []
    paint = scene_module.paint_thing
    monkeypatch.setattr(
        scene_module, "paint_thing", lambda *args: (painted.append(args[2].name), paint(*args))
    )
    names = {c.id: c.name for c in CATEGORIES}
    for index in range(8):
        painted.clear()
        scene = generate_scene(seed=1, index=index, size=(128, 96))
        assert painted == [names[thing.category_id] for thing in scene.objects]


def test_image_and_mask_agree_on_every_pixel(monkeypatch):
    """A pixel shows at least half of a thing exactly when the truth gives it to that thing."""
    placed, instance = place_things(np.random.default_rng(2), height=90, width=120, margin=8)
    monkeypatch.setattr(paint_module, "_relief", lambda patch, light: np.float32(1.0))
    monkeypatch.setattr(paint_module, "_cast_shadow", lambda *args: None)
    seen = np.zeros(instance.shape, dtype=int)
    for number, placement in enumerate(placed, start=1):
        monkeypatch.setattr(
            paint_module,
            "_surface",
            lambda rng, patch, main: np.ones((3, *patch.distance.shape), dtype=np.float32),
        )
        image = np.zeros((3, *instance.shape), dtype=np.float32)
        paint_module.paint_thing(np.random.default_rng(0), image, placement, (0.0, -1.0))
        seen[image[0] >= 0.5] = number
    assert len(placed) >= NUM_THINGS[0]
    assert np.array_equal(seen, instance)


def test_clutter_leaves_the_labels_alone():
    canvas = draw_background(np.random.default_rng(0), height=64, width=80)
    labels, image = canvas.labels.copy(), canvas.image.copy()
    draw_clutter(np.random.default_rng(1), canvas)
    assert np.array_equal(canvas.labels, labels)
    assert not np.array_equal(canvas.image, image)


def test_backgrounds_show_every_stuff_class_and_label_every_pixel():
    seen = set()
    for seed in range(16):
        canvas = draw_background(np.random.default_rng(seed), height=40, width=56)
        assert canvas.image.dtype == np.float32
        seen |= set(np.unique(canvas.labels).tolist())
    assert seen == {c.id for c in STUFF}


def test_all_thing_classes_and_occlusion_occur():
    scenes = [generate_scene(seed=0, index=k, size=(128, 128)) for k in range(25)]
    objects = [thing for scene in scenes for thing in scene.objects]
    assert {thing.category_id for thing in objects} == {c.id for c in THINGS}
    hidden = np.mean([thing.area < thing.full_area for thing in objects])
    assert 0.2 < hidden < 0.8


def test_categories_are_contiguous_things_first():
    assert [c.id for c in CATEGORIES] == list(range(1, 13))
    assert CATEGORIES == THINGS + STUFF
    assert len({c.name for c in CATEGORIES}) == len(CATEGORIES)


@pytest.mark.parametrize(
    ("top", "left", "frame", "part"),
    [
        (2, 3, (2, 7, 3, 8), (0, 5, 0, 5)),
        (-2, 8, (0, 3, 8, 10), (2, 5, 0, 2)),
        (-9, 0, (0, 0, 0, 5), None),
        (20, 0, (20, 20, 0, 5), None),
    ],
)
def test_clip_window(top, left, frame, part):
    (fy, fx), (py, px) = clip_window(top=top, left=left, side=5, height=8, width=10)
    assert (fy.stop - fy.start, fx.stop - fx.start) == (py.stop - py.start, px.stop - px.start)
    assert (fy.start, fy.stop, fx.start, fx.stop) == frame
    if part is not None:
        assert (py.start, py.stop, px.start, px.stop) == part


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"size": (31, 64)}, "size must be 32..4096 pixels per side, got 31x64; use for example"),
        ({"size": (64, 5000)}, "got 64x5000"),
        ({"seed": -1}, "must be >= 0, got seed -1, index 0"),
        ({"index": -2}, "index -2"),
    ],
)
def test_bad_arguments_say_what_to_do(change, text):
    with pytest.raises(ValueError, match=text):
        generate_scene(**{"seed": 0, "index": 0, "size": (64, 64)} | change)
