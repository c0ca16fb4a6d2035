"""Tasks: the answer is nowhere near what it decides, and everything else is exact."""

import json
from itertools import pairwise

import cv2
import numpy as np
import pytest

from segtrain.cli import main
from segtrain.data.commands import _TASKS as TOLD
from segtrain.data.synthetic import TASKS, draw_task, write_dataset, write_task
from segtrain.data.synthetic.tasks.outlines import near_border
from segtrain.data.synthetic.tasks.scales import AMPLITUDE, engrave
from segtrain.evaluation.boundary_iou import band

AMBIGUOUS = [name for name, task in TASKS.items() if task.reach]
NUM = 12


def both_answers(task, index, side=64):
    return [draw_task(task=task, seed=3, index=index, side=side, answer=k) for k in (0, 1)]


def within(needs, radius):
    """Pixels at most so far from one that needs the mechanism."""
    return cv2.distanceTransform((~needs).astype(np.uint8), cv2.DIST_L2, 5) <= radius


def patches_of(drawn, radius):
    """Bytes of the square around every pixel that needs the mechanism."""
    image = np.pad(drawn.image, ((radius, radius), (radius, radius), (0, 0)), "reflect")
    size = 2 * radius + 1
    return [image[y : y + size, x : x + size].tobytes() for y, x in np.argwhere(drawn.needs)]


def best_local_guess(task, radius):
    """Accuracy of the best rule on patches, where every image comes with both answers."""
    seen = {}
    for index in range(NUM):
        for drawn in both_answers(task, index):
            for patch in patches_of(drawn, radius):
                seen.setdefault(patch, [0, 0])[drawn.answer] += 1
    counts = np.array(list(seen.values()))
    return counts.max(1).sum() / counts.sum()


@pytest.mark.parametrize("task", TASKS)
def test_an_image_depends_on_its_request_alone(task):
    first, again, other = (draw_task(task=task, seed=3, index=k) for k in (5, 5, 6))
    for name in ("image", "semantic", "needs"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.image, other.image)
    assert first.image.shape == (64, 64, 3)
    assert first.image.dtype == first.semantic.dtype == np.uint8
    assert not np.array_equal(first.image, draw_task(task=task, seed=4, index=5).image)


@pytest.mark.parametrize("side", [64, 96])
@pytest.mark.parametrize("task", AMBIGUOUS)
def test_nothing_near_tells_the_answer(task, side):
    radius = TASKS[task].reach * side / 64
    for index in range(NUM):
        zero, one = both_answers(task, index, side)
        np.testing.assert_array_equal(zero.needs, one.needs)
        near = within(zero.needs, radius)
        np.testing.assert_array_equal(zero.image[near], one.image[near])
        assert np.any(zero.image != one.image), "something must tell it"
        first, second = TASKS[task].scored
        assert set(zero.semantic[zero.needs]) == {first}
        assert set(one.semantic[one.needs]) == {second}
        assert np.array_equal(zero.semantic[~near], one.semantic[~near]) or task == "detail"


@pytest.mark.parametrize(("task", "accuracy"), [*((t, 0.5) for t in AMBIGUOUS), ("local", 1.0)])
def test_best_guess_from_a_patch(task, accuracy):
    # The half diagonal of the square is within the blind radius.
    assert best_local_guess(task, 4) == accuracy


@pytest.mark.parametrize("task", AMBIGUOUS)
def test_what_decides_is_just_outside_of_the_blind_radius(task):
    least = []
    for index in range(NUM):
        zero, one = both_answers(task, index)
        away = cv2.distanceTransform((~zero.needs).astype(np.uint8), cv2.DIST_L2, 5)
        least.append(away[(zero.image != one.image).any(2)].min())
    assert min(least) < TASKS[task].reach + 6


@pytest.mark.parametrize("task", TASKS)
def test_every_image_needs_it_and_answers_are_fair(task):
    drawn = [draw_task(task=task, seed=0, index=index) for index in range(120)]
    assert all(d.needs.any() for d in drawn)
    assert 0.4 < np.mean([d.answer for d in drawn]) < 0.6
    classes = set().union(*(set(np.unique(d.semantic).tolist()) for d in drawn))
    assert classes == set(range(len(TASKS[task].classes)))


def test_neither_kind_of_sign_tells_the_scene():
    """Both colours of each kind come with both answers; only together they tell it."""
    table = np.zeros((2, 2, 2), int)  # warm squares, green stars, answer
    for index in range(60):
        d = draw_task(task="scene", seed=1, index=index)
        red, green, blue = d.image[d.semantic == 1].astype(int).T
        squares = ((red > blue + 60) & (red > green + 20)).sum(), (blue > red + 60).sum()
        stars = (green > red + 30) & (green > blue + 20), (red > green + 60) & (blue > green + 30)
        warm = int(squares[0] > squares[1])
        table[warm, int(stars[0].sum() > stars[1].sum()), d.answer] += 1
    assert (table.sum(1) > 0).all()
    assert (table.sum(0) > 0).all()
    assert ((table > 0).sum(2) == 1).all(), "the two together leave one answer"


def test_lines_vanish_in_every_mean_over_even_cells():
    for index in range(NUM):
        zero, one = both_answers("detail", index)
        core = zero.semantic == 1
        assert (zero.image[core] != one.image[core]).any()
        for cell in (2, 8):
            shape = (64 // cell, cell, 64 // cell, cell, 3)
            means = [d.image.reshape(shape).mean((1, 3)) for d in (zero, one)]
            np.testing.assert_array_equal(*means)


def test_engraving_stays_in_range_and_on_the_core():
    image = np.array([0, 255], np.uint8).repeat(24).reshape(4, 4, 3)
    core = np.zeros((4, 4), bool)
    core[:2] = True
    rows, columns = (engrave(image, core, k).astype(int) for k in (0, 1))
    assert rows[0, 0, 0] - rows[1, 0, 0] == 2 * AMPLITUDE == columns[0, 0, 0] - columns[0, 1, 0]
    assert (rows[0, 0] == rows[0, 1]).all()
    np.testing.assert_array_equal(rows[2:], np.full((2, 4, 3), 255 - AMPLITUDE))


def test_outline_and_its_band():
    for index in range(NUM):
        d = draw_task(task="boundary", seed=0, index=index)
        inner = np.zeros((64, 64), bool)
        inner[1:-1, 1:-1] = True
        np.testing.assert_array_equal(d.needs[inner], band(d.semantic, 1)[inner])
        assert 0.1 < (d.semantic == 1).mean() < 0.6
        assert not d.semantic[[0, -1]].any(), "the object ends inside the frame"
    assert not near_border(np.ones((5, 5), bool)).any()


def test_outlines_are_no_circles():
    """A disc of the same area misses part of the object, most of it by less than a cell of 8."""
    for index in range(NUM):
        d = draw_task(task="boundary", seed=0, index=index)
        inside = d.semantic == 1
        y, x = np.argwhere(inside).mean(0)
        away = np.hypot(*(np.indices((64, 64)) - np.array([y, x])[:, None, None]))
        reach = away[inside & near_border(inside)]
        assert 2.0 < np.ptp(reach) < 24.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"task": "fra"}, "unknown task 'fra'; use one of far, whole"),
        ({"seed": -1}, "seed and index must be >= 0"),
        ({"side": 60}, "side must be a multiple of 8 from 64 to 512 pixels, got 60"),
        ({"side": 520}, "got 520"),
        ({"answer": 2}, "answer must be 0 or 1, got 2"),
    ],
)
def test_messages(wrong, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        draw_task(**{"task": "far", "seed": 0, "index": 0} | wrong)


def test_help_tells_of_every_task():
    assert list(TOLD) == list(TASKS)
    assert len({task.number for task in TASKS.values()}) == len(TASKS)


def synth(out, *more):
    return main(["data", "synth", "--out", str(out), "--task", "detail", "--num", "4", *more])


def test_a_written_task_is_sound(tmp_path, capsys):
    out = tmp_path / "detail"
    assert synth(out) == 0
    assert "wrote 3 train and 1 val images (detail)" in capsys.readouterr().out
    assert (out / "classes.txt").read_text().splitlines() == list(TASKS["detail"].classes)
    drawn = draw_task(task="detail", seed=0, index=3)
    saved = cv2.imread(str(out / "masks/val/000003.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(saved, drawn.semantic)
    image = cv2.imread(str(out / "images/val/000003.png"))[..., ::-1]
    np.testing.assert_array_equal(image, drawn.image)
    assert json.loads((out / "synth.json").read_text())["task"] == "detail"
    assert synth(out) == 0
    assert "already there" in capsys.readouterr().out
    assert main(["data", "check", "--dataset", "folder", "--root", str(out)]) == 0
    assert "train: 3 images, fine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--format", "coco"), "expected --format folder, got coco"),
        (("--size", "64x128"), "expected a square, got 64x128"),
        (("--size", "65"), "side must be a multiple of 8"),
        (("--workers", "2"), "expected no --workers"),
        (("--val-fraction", "1"), "val-fraction must be"),
    ],
)
def test_options_that_do_not_fit(tmp_path, capsys, more, message):
    assert synth(tmp_path / "x", *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_tasks_and_scenes_do_not_replace_each_other_unasked(tmp_path):
    scenes, tasks = tmp_path / "scenes", tmp_path / "tasks"
    write_dataset(out=scenes, fmt="folder", num=1, size=(64, 64))
    write_task(out=tasks, task="far", num=1)
    with pytest.raises(ValueError, match=r"another synthetic data set \(different: .*task"):
        write_task(out=scenes, task="far", num=1)
    with pytest.raises(ValueError, match=r"another synthetic data set \(different: .*size"):
        write_dataset(out=tasks, fmt="folder", num=1, size=(64, 64))
    with pytest.raises(ValueError, match=r"different: task"):
        write_task(out=tasks, task="scene", num=1)
    write_task(out=tasks, task="scene", num=1, overwrite=True)
    assert (tasks / "classes.txt").read_text().splitlines() == list(TASKS["scene"].classes)


def test_progress_and_bad_numbers(tmp_path):
    seen = []
    write_task(out=tmp_path / "x", task="far", num=3, progress=lambda *at: seen.append(at))
    assert [b[0] - a[0] for a, b in pairwise(seen)] == [1, 1]
    assert seen[-1] == (3, 3)
    with pytest.raises(ValueError, match="num must be"):
        write_task(out=tmp_path / "y", task="far", num=0)
