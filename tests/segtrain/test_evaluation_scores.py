"""Confusion matrix, size groups and boundary IoU against loops, other libraries and by hand."""

import itertools
import math

import numpy as np
import pytest
import torch

from segtrain.errors import UserError
from segtrain.evaluation.boundary_iou import BoundaryCounts, band
from segtrain.evaluation.confusion import ConfusionMatrix
from segtrain.evaluation.size_groups import ClassSizes, size_groups

NAN = float("nan")


def maps(count=4, *, classes=6, size=(13, 17), seed=0, used=None):
    """Predictions and ground truths with void; `used` limits the classes of the ground truth."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        label = rng.integers(0, used or classes, size).astype(np.uint8)
        prediction = np.where(rng.random(size) < 0.6, label, rng.integers(0, classes, size))
        label[rng.random(size) < 0.1] = 255
        yield prediction.astype(np.uint8), label


def counted(pairs, classes=6) -> ConfusionMatrix:
    matrix = ConfusionMatrix(classes)
    for prediction, label in pairs:
        matrix.update(prediction, label)
    return matrix


# ---- confusion matrix ------------------------------------------------------------------------
def test_a_matrix_by_hand():
    label = np.array([[0, 0, 0, 1], [1, 2, 255, 255]], np.uint8)
    prediction = np.array([[0, 0, 1, 1], [2, 2, 2, 0]], np.uint8)
    matrix = counted([(prediction, label)], 3)
    assert matrix.counts.tolist() == [[2, 1, 0], [0, 1, 1], [0, 0, 1]]
    scores = matrix.scores()
    assert scores.iou == pytest.approx((2 / 3, 1 / 3, 1 / 2))
    assert scores.miou == pytest.approx(0.5)
    assert scores.pixel_accuracy == pytest.approx(4 / 6)
    assert scores.accuracy == pytest.approx((2 / 3, 1 / 2, 1))
    assert scores.mean_accuracy == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert scores.fw_iou == pytest.approx(3 / 6 * 2 / 3 + 2 / 6 * 1 / 3 + 1 / 6 * 1 / 2)
    assert (scores.num_pixels, scores.num_void) == (6, 2)


def test_counts_equal_a_loop():
    expected = np.zeros((6, 6), np.int64)
    for prediction, label in maps():
        for p, g in zip(prediction.flat, label.flat, strict=True):
            if g != 255:
                expected[g, p] += 1
    assert (counted(maps()).counts == expected).all()
    assert counted(maps()).counts.dtype == np.int64


def test_absent_classes_are_skipped_and_predicted_ones_count_zero():
    label = np.zeros((2, 4), np.uint8)
    prediction = np.array([[0, 0, 0, 1], [0, 0, 0, 1]], np.uint8)
    scores = counted([(prediction, label)], 3).scores()
    assert scores.iou[:2] == (0.75, 0.0)
    assert math.isnan(scores.iou[2])
    assert scores.miou == 0.375
    assert scores.mean_accuracy == 0.75  # class 1 is not in the ground truth


def test_order_halves_and_batches_do_not_matter():
    pairs = list(maps())
    whole = counted(pairs)
    assert (counted(pairs[::-1]).counts == whole.counts).all()
    first, second = counted(pairs[:1]), counted(pairs[1:])
    first.merge(second)
    assert (first.counts == whole.counts).all()
    assert first.num_void == whole.num_void > 0
    batch = [torch.from_numpy(np.stack(maps)).long() for maps in zip(*pairs, strict=True)]
    assert (counted([batch]).counts == whole.counts).all()


def test_an_image_of_void_changes_nothing_but_the_void():
    pairs = list(maps())
    void = (pairs[0][0], np.full((13, 17), 255, np.uint8))
    before, after = counted(pairs).scores(), counted([*pairs, void]).scores()
    assert (before.iou, before.num_pixels) == (after.iou, after.num_pixels)
    assert after.num_void == before.num_void + 13 * 17


def test_nothing_counted_gives_no_score():
    scores = ConfusionMatrix(3).scores()
    assert all(math.isnan(v) for v in (scores.miou, scores.pixel_accuracy, scores.fw_iou))


def test_scores_equal_torchmetrics():
    tm = pytest.importorskip(
        "torchmetrics.classification", reason="torchmetrics is not installed; it only tests"
    )
    keywords = {"num_classes": 6, "ignore_index": 255}
    counts = tm.MulticlassConfusionMatrix(**keywords)
    iou = tm.MulticlassJaccardIndex(**keywords, average="none")
    accuracy = tm.MulticlassAccuracy(**keywords, average="none")
    for pair in maps(used=5):
        tensors = [torch.from_numpy(m).long()[None] for m in pair]
        for metric in (counts, iou, accuracy):
            metric.update(*tensors)
    matrix = counted(maps(used=5))
    assert (matrix.counts == counts.compute().numpy()).all()
    assert np.nan_to_num(matrix.scores().iou) == pytest.approx(iou.compute().numpy(), abs=1e-6)
    known = matrix.scores().accuracy[:5]
    assert known == pytest.approx(accuracy.compute().numpy()[:5].tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("prediction", "label", "message"),
    [
        ([[0, 6]], [[0, 1]], r"a.png: prediction has the values 6, expected 0\.\.5; check"),
        ([[255, 0]], [[0, 1]], "a.png: prediction has the values 255"),
        ([[0, 1]], [[7, 90]], r"a.png: ground truth has the values 7, 90, .* or 255 for void"),
        ([[0, 1]], [[-1, 0]], "values from -1 to 0"),
        ([[0, 300]], [[0, 0]], "values from 0 to 300"),
        ([[0]], [[0, 1]], r"has size \(1, 1\), the ground truth \(1, 2\); predict at"),
    ],
)
def test_what_is_no_class_is_named_and_never_clipped(prediction, label, message):
    matrix = ConfusionMatrix(6)
    with pytest.raises(UserError, match=message):
        matrix.update(np.array(prediction), np.array(label), name="a.png")
    assert matrix.counts.sum() == 0


def test_other_errors():
    with pytest.raises(TypeError, match="prediction must hold integers, got float64; take the"):
        ConfusionMatrix(2).update(np.zeros((2, 2)), np.zeros((2, 2), int))
    with pytest.raises(ValueError, match="num_classes must be in 1..255, got 256"):
        ConfusionMatrix(256)
    with pytest.raises(ValueError, match="2 classes to one of 3; count both"):
        ConfusionMatrix(3).merge(ConfusionMatrix(2))


# ---- size groups -----------------------------------------------------------------------------
def test_sizes_of_known_components():
    label = np.full((12, 12), 2, np.uint8)
    label[0:2, 0:3] = 0  # 6 pixels
    label[2, 3] = 0  # touches at a corner: the same component
    label[8, 8] = 0  # a component of its own
    label[5:9, 0:4] = 1
    label[11, 11] = 255
    sizes = ClassSizes(4)
    sizes.update(label)
    other = np.full((3, 4), 1, np.uint8)
    sizes.update(other)
    assert sizes.components.tolist() == [2, 2, 1, 0]
    assert sizes.statistic("component").tolist()[:3] == [8 / 2, (16 + 12) / 2, 144 - 8 - 16 - 1]
    assert sizes.statistic("image").tolist()[:3] == [8, 14, 119]
    assert math.isnan(sizes.statistic("image")[3])


@pytest.mark.parametrize(
    ("known", "lengths"),
    [(3, (1, 1, 1)), (4, (2, 1, 1)), (5, (2, 2, 1)), (7, (3, 2, 2)), (1, (1, 0, 0))],
)
def test_groups_are_as_equal_as_possible_and_larger_first(known, lengths):
    statistic = [float(k) for k in range(known)] + [NAN]
    groups = size_groups(statistic, [0.5] * known + [NAN])
    assert tuple(len(g.classes) for g in groups) == lengths
    assert sorted(itertools.chain(*(g.classes for g in groups))) == list(range(known))


def test_groups_are_ranked_by_size_ties_by_number():
    groups = size_groups([5, 1, 5, 0.5, 9, 5], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert [g.classes for g in groups] == [(3, 1), (0, 2), (5, 4)]
    assert [g.name for g in groups] == ["small", "medium", "large"]
    assert [g.miou for g in groups] == pytest.approx([0.3, 0.2, 0.55])


def test_many_ties_stay_in_the_order_of_their_numbers():
    groups = size_groups([5.0, 1.0] * 60, [0.5] * 120)
    ranked = list(itertools.chain(*(g.classes for g in groups)))
    assert ranked == [*range(1, 120, 2), *range(0, 120, 2)]


def test_mean_of_three_full_groups_is_miou():
    sizes, matrix = ClassSizes(6), ConfusionMatrix(6)
    for prediction, label in maps():
        sizes.update(label)
        matrix.update(prediction, label)
    scores = matrix.scores()
    groups = size_groups(sizes.statistic("component"), scores.iou)
    assert np.mean([g.miou for g in groups]) == pytest.approx(scores.miou)


# ---- boundary --------------------------------------------------------------------------------
def slow_band(labels: np.ndarray, width: int) -> np.ndarray:
    height, length = labels.shape
    result = np.zeros(labels.shape, bool)
    for y, x in np.ndindex(*labels.shape):
        for dy, dx in itertools.product(range(-width, width + 1), repeat=2):
            v, u = y + dy, x + dx
            outside = not (0 <= v < height and 0 <= u < length)
            result[y, x] |= outside or labels[v, u] != labels[y, x]
    return result


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("size", [(9, 14), (1, 7), (15, 15)])
def test_band_equals_its_definition(size, width):
    labels = (np.random.default_rng(1).random(size) < 0.04).astype(np.uint8)
    labels[:, 8:] = 255
    assert (band(labels, width) == slow_band(labels, width)).all()


def test_boundary_iou_equals_a_loop_over_classes():
    rng = np.random.default_rng(0)
    counts, both, either = BoundaryCounts(4, ratio=0.1), np.zeros(4), np.zeros(4)
    for _ in range(3):
        label = np.kron(rng.integers(0, 3, (3, 4)), np.ones((8, 7))).astype(np.uint8)
        prediction = np.roll(label, 1, axis=1)
        label[:5, :6] = 255
        counts.update(prediction, label)
        width = round(0.1 * math.hypot(*label.shape))
        for k in range(4):
            masks = [(m == k) & (label != 255) for m in (label, prediction)]
            g, p = (m & slow_band(m.astype(np.uint8), width) for m in masks)
            both[k] += (g & p).sum()
            either[k] += (g | p).sum()
    assert counts.iou()[:3] == pytest.approx(both[:3] / either[:3])
    assert math.isnan(counts.iou()[3])
    assert 0.05 < counts.iou()[0] < 0.95


def test_a_perfect_prediction_has_boundary_iou_1_whatever_stands_on_void():
    label = np.kron(np.arange(6).reshape(2, 3), np.ones((10, 10))).astype(np.uint8)
    prediction = label.copy()
    label[6:14, 6:14] = 255
    counts = BoundaryCounts(6)
    counts.update(prediction, label)
    assert counts.iou().tolist() == [1.0] * 6


def test_boundary_iou_sees_what_iou_hardly_sees():
    label = np.zeros((100, 100), np.uint8)
    label[10:90, 10:90] = 1
    prediction = np.zeros_like(label)
    prediction[13:87, 13:87] = 1
    counts, matrix = BoundaryCounts(2), counted([(prediction, label)], 2)
    counts.update(prediction, label)
    assert matrix.scores().iou[1] > 0.85
    assert counts.iou()[1] < 0.2
