"""`segtrain runs compare`: the paired bootstrap, what is refused, and what is said."""

import json
import math
import os
import time
import tracemalloc

import numpy as np
import pytest

from segtrain.cli import main
from segtrain.errors import UserError
from segtrain.evaluation import paired
from segtrain.evaluation.compare import compare, counts_name, find_counts
from segtrain.evaluation.confusion import ConfusionMatrix
from segtrain.evaluation.paired import paired_bootstrap, scores_of
from segtrain.evaluation.per_image import Recorder, read_counts, write_counts
from segtrain.evaluation.size_groups import ClassSizes, size_groups
from tests.segtrain.toy_runs import config_of, write_folder, write_run

NAMES = ("sky", "tree", "road", "car")
ABOUT = {"dataset": "toy", "split": "val", "classes": list(NAMES), "inference": {"flip": False}}


def simulated(num_images: int, quality: float, seed: int = 0, *, num_classes: int = 4):
    """Confusion matrices of images in which `quality` of the pixels are right, more or less.

    Ground truth depends on the seed alone. Every image shows one to three classes, some images are
    harder than others, and what is wrong is spread over all classes.
    """
    truth_rng = np.random.default_rng(seed)
    rng = np.random.default_rng([seed, int(quality * 1e6)])
    found = []
    for _ in range(num_images):
        matrix = ConfusionMatrix(num_classes)
        shown = truth_rng.choice(num_classes, truth_rng.integers(1, 4), replace=False)
        ease = truth_rng.normal(0, 0.1)
        for k in shown:
            pixels = int(truth_rng.integers(20, 200))
            right = min(pixels, max(0, round(pixels * (quality + ease + rng.normal(0, 0.05)))))
            matrix.counts[k, k] = right
            matrix.counts[k] += rng.multinomial(pixels - right, [1 / num_classes] * num_classes)
        matrix.num_void = int(truth_rng.integers(5))
        found.append(matrix)
    return found


def sums(matrices):
    """(right, union), each [N, K]."""
    counts = np.stack([matrix.counts for matrix in matrices]).astype(float)
    right = np.einsum("nkk->nk", counts)
    return right, counts.sum(axis=1) + counts.sum(axis=2) - right


def both(a, b):
    (right_a, union_a), (right_b, union_b) = sums(a), sums(b)
    return (right_a, right_b), (union_a, union_b)


def write(path, matrices, *, names=None, **fields):
    recorder, sizes = Recorder(), ClassSizes(len(NAMES))
    for number, matrix in enumerate(matrices):
        recorder.add(names[number] if names else f"image {number}", matrix)
        area = matrix.counts.sum(axis=1)
        sizes.area += area
        sizes.images += area > 0
        sizes.components += (1, 10, 100, 1000) * (area > 0)
    write_counts(path, recorder.counts({**ABOUT, **fields}, sizes))
    return path


# ---- the bootstrap ---------------------------------------------------------------------------
def by_hand(a, b, groups, *, samples, seed):
    """Every sample image by image, scored by the confusion matrix of the evaluation."""

    def scores(matrices):
        total = ConfusionMatrix(len(NAMES))
        for matrix in matrices:
            total.merge(matrix)
        s = total.scores()
        means = [
            np.mean(known) if (known := [s.iou[k] for k in g if not math.isnan(s.iou[k])]) else None
            for g in groups
        ]
        return np.array([s.miou, s.pixel_accuracy, *means, *s.iou], float)

    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(samples):
        images = rng.integers(0, len(a), len(a))
        drawn.append(scores([b[n] for n in images]) - scores([a[n] for n in images]))
    return scores(a), scores(b), np.array(drawn)


@pytest.mark.parametrize("chunk", [1, 35, 1 << 20])
def test_equals_a_slow_loop(monkeypatch, chunk):
    monkeypatch.setattr(paired, "_CHUNK", chunk)
    groups = ((3,), (0, 2), (1,))
    a, b = simulated(5, 0.6), simulated(5, 0.7)
    for matrix in (*a[1:], *b[1:]):  # so some samples lack the last class
        matrix.counts[3], matrix.counts[:, 3] = 0, 0
    found = paired_bootstrap(*both(a, b), groups, samples=150, seed=3)
    score_a, score_b, drawn = by_hand(a, b, groups, samples=150, seed=3)
    assert np.isnan(drawn).any()
    assert len(found) == 2 + 3 + 4
    for gain, of_a, of_b, column in zip(found, score_a, score_b, drawn.T, strict=True):
        known = column[~np.isnan(column)]
        assert (gain.a, gain.b) == pytest.approx((of_a, of_b), abs=1e-14)
        ends = np.percentile(known, [2.5, 97.5])
        assert (gain.low, gain.high) == pytest.approx(tuple(ends), abs=1e-14)
        sign = np.sign(of_b - of_a)
        halves = [1 if np.sign(d) == sign else 0.5 if d == 0 else 0 for d in known]
        assert gain.sign_probability == pytest.approx(np.mean(halves), abs=1e-14)


def test_a_class_of_neither_side_is_left_out_of_the_mean_and_one_only_predicted_counts_zero():
    right = np.array([[8.0, 0, 0], [8, 0, 0]])
    union = np.array([[10.0, 0, 0], [10, 0, 2]])
    scores = scores_of(right, union, groups=((1,), (0, 2)))
    assert scores[0].tolist()[0] == 0.8
    assert scores[1].tolist()[0] == 0.4
    assert math.isnan(scores[0][2])
    assert scores[1][3] == 0.4
    assert scores[0][1] == pytest.approx(8 / 9)  # one wrong pixel lies in two unions


def test_samples_are_paired():
    # Images differ a lot, B is better by one pixel in each: only pairs can see that.
    truth = np.random.default_rng(0).integers(50, 1000, (40, 4)).astype(float)
    right = np.round(truth * np.random.default_rng(1).random((40, 1)) * 0.9)
    gain = paired_bootstrap((right, right + 1), (truth, truth), samples=500)[0]
    assert gain.low > 0
    assert gain.high - gain.low < 0.1 * gain.difference * 4
    assert gain.sign_probability == 1


def test_a_known_shift_is_found_and_mirrored():
    a, b = simulated(100, 0.6), simulated(100, 0.65)
    forth = paired_bootstrap(*both(a, b), samples=1000)
    back = paired_bootstrap(*both(b, a), samples=1000)
    for one, other in zip(forth, back, strict=True):
        assert one.difference == -other.difference
        assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-14)
        assert one.sign_probability == pytest.approx(other.sign_probability, abs=1e-14)
    assert forth[0].is_told
    many = both(simulated(3000, 0.6, seed=9), simulated(3000, 0.65, seed=9))
    true = paired_bootstrap(*many, samples=1)[0].difference
    assert 0 < forth[0].low < true < forth[0].high < 2 * true
    assert back[0].high < 0


def test_identical_sides_differ_by_exactly_nothing():
    a = simulated(20, 0.6)
    for gain in paired_bootstrap(*both(a, a), ((0, 1),), samples=200):
        assert (gain.difference, gain.low, gain.high) == (0, 0, 0)
        assert gain.sign_probability == 0.5
        assert not gain.is_told


def test_a_seed_repeats_and_another_does_not():
    sides = both(simulated(20, 0.6), simulated(20, 0.62))
    first, again, other = (paired_bootstrap(*sides, samples=200, seed=s)[0] for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_intervals_hold_the_truth_as_often_as_they_promise():
    # 150 splits of 50 images from a population of 3000, whose difference is known.
    a, b = both(simulated(3000, 0.60, seed=5), simulated(3000, 0.62, seed=5))
    everything = paired_bootstrap(a, b, samples=1)
    rng = np.random.default_rng(0)
    held = np.zeros(3)
    for trial in range(150):
        some = rng.choice(3000, 50)
        found = paired_bootstrap(
            tuple(side[some] for side in a),
            tuple(side[some] for side in b),
            samples=300,
            seed=trial,
        )
        for number in range(3):  # mIoU, pixel accuracy, the first class
            gain, true = found[number], everything[number].difference
            held[number] += gain.low <= true <= gain.high
    # Binomial: 95 % of 150 are 142.5 +- 2.7; percentiles are a little too narrow at 50 images.
    assert (held >= 134).all()
    assert (held <= 149).all()


def test_without_a_difference_one_is_rarely_told():
    told = 0
    for trial in range(60):
        a, b = simulated(40, 0.6, seed=trial), simulated(40, 0.6 + 1e-6, seed=trial)
        told += paired_bootstrap(*both(a, b), samples=200, seed=trial)[0].is_told
    assert told <= 9  # 3 expected; more than 9 in one of a thousand


def test_memory_is_bounded_whatever_the_number_of_samples():
    rng = np.random.default_rng(0)
    truth = (rng.integers(0, 5000, (500, 150)) * (rng.random((500, 150)) < 0.06)).astype(float)
    right = (truth * 0.7).round()
    peaks = []
    for samples in (2000, 8000):
        tracemalloc.start()
        paired_bootstrap((right, right), (truth, truth), samples=samples)
        peaks.append(tracemalloc.get_traced_memory()[1] / 2**20)
        tracemalloc.stop()
    # Only the differences grow, 8 bytes each.
    assert peaks[1] - peaks[0] < 1.1 * 6000 * 152 * 8 / 2**20
    assert peaks[0] < 40


# ---- what has to agree -----------------------------------------------------------------------
@pytest.fixture
def pair(tmp_path):
    a = write(tmp_path / "a.npz", simulated(40, 0.6))
    b = write(tmp_path / "b.npz", simulated(40, 0.65))
    return a, b


def refused(a, b, text, **options):
    with pytest.raises(UserError, match=text) as error:
        compare(a, b, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"dataset": "ade20k"}, r"a.npz has dataset toy, .*b.npz dataset ade20k; only scores of"),
        ({"split": "test"}, r"a.npz has split val, .*b.npz split test; only"),
        (
            {"classes": ["sky", "tree", "road", "bus"]},
            r"has 4 classes \(car\), .*b.npz 4 classes \(bus\); only",
        ),
        ({"classes": ["tree", "sky", "road", "car"]}, r"has 4 classes, .* 4 classes; only"),
    ],
)
def test_other_data_are_refused(pair, fields, text):
    write(pair[1], simulated(40, 0.65), **fields)
    refused(*pair, text)


def test_other_images_are_refused(pair):
    write(pair[1], simulated(41, 0.65))
    refused(*pair, r"a.npz has 40 images, .*b.npz 41, they differ in image 40; evaluate both on")
    names = [f"image {number}" for number in range(40)]
    write(pair[1], simulated(40, 0.65), names=["other", *names[1:]])
    refused(*pair, r"they differ in image 0, other; evaluate")
    write(pair[1], simulated(40, 0.65), names=[*names[1:], names[0]])
    refused(*pair, r"they differ in their order; evaluate")


def test_other_labels_are_refused(pair):
    matrices = simulated(40, 0.65)
    matrices[7].counts[0, 1] += 1
    matrices[9].num_void += 1
    write(pair[1], matrices)
    refused(*pair, r"scored against other labels in image 7, image 9; evaluate both with the same")


def test_one_image_tells_nothing(tmp_path):
    one = write(tmp_path / "one.npz", simulated(1, 0.6))
    refused(one, one, "has one image; two at least")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"samples": 99}, r"samples must be in 100..100000, got 99"),
        ({"samples": 100_001}, r"got 100001"),
        ({"seed": -1}, r"seed must not be negative, got -1"),
    ],
)
def test_options_out_of_range_are_refused(pair, options, text):
    refused(*pair, text, **options)


def test_runs_results_and_files_are_found(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(UserError, match=r"run has no counts of .*; run: segtrain eval .*run$"):
        find_counts(run)
    val = write(run / counts_name("val"), simulated(3, 0.6))
    assert find_counts(run) == find_counts(run, "val") == find_counts(val) == val
    with pytest.raises(UserError, match=r"; run: segtrain eval .*run --split test"):
        find_counts(run, "test")
    write(run / counts_name("train/part"), simulated(3, 0.6))
    with pytest.raises(UserError, match=r"several splits; add --split, one of train_part, val"):
        find_counts(run)
    assert find_counts(run, "train/part").name == "per_image_train_part.npz"
    assert find_counts(tmp_path / "r.json") == tmp_path / "r.npz"


# ---- what is said ----------------------------------------------------------------------------
def test_scores_and_groups_are_those_of_the_evaluation(pair):
    result = compare(*pair, samples=100)
    for side, quality in (("a", 0.6), ("b", 0.65)):
        total = ConfusionMatrix(4)
        for matrix in simulated(40, quality):
            total.merge(matrix)
        scores = total.scores()
        assert getattr(result.miou, side) == pytest.approx(scores.miou, abs=1e-14)
        accuracy = getattr(result.pixel_accuracy, side)
        assert accuracy == pytest.approx(scores.pixel_accuracy, abs=1e-14)
        iou = [getattr(gain, side) for gain in result.classes.values()]
        assert iou == pytest.approx(scores.iou, abs=1e-14)
        statistic = read_counts(pair[0]).class_sizes().statistic("component")
        for group in size_groups(statistic, scores.iou):
            names, gain = result.groups[group.name]
            assert names == tuple(NAMES[k] for k in group.classes)
            assert getattr(gain, side) == pytest.approx(group.miou, abs=1e-14)
    by_image = compare(*pair, samples=100, statistic="image").groups
    assert by_image["small"][0] != result.groups["small"][0]


def test_the_better_side_is_named_whichever_it_is(pair):
    forth, back = compare(*pair), compare(*reversed(pair))
    gain = forth.miou
    points = [f"{100 * value:.2f}" for value in (gain.difference, gain.low, gain.high)]
    sentence = f"is better by {points[0]} [{points[1]}, {points[2]}] points of mIoU"
    assert forth.verdict() == f"B {sentence}"
    assert back.verdict() == f"A {sentence}"


def test_the_table(pair):
    result = compare(*pair)
    lines = result.text().splitlines()
    assert lines[:2] == [f"A: {pair[0]}", f"B: {pair[1]}"]
    assert lines[2].split() == ["A", "B", "B", "-", "A", "95%", "interval", "sign"]
    gain = result.miou
    told = [f"{100 * gain.a:.2f}", f"{100 * gain.b:.2f}", f"{100 * gain.difference:+.2f}"]
    told += [f"[{100 * gain.low:+.2f},", f"{100 * gain.high:+.2f}]", "100.00", "*"]
    assert lines[4].split() == ["mIoU", *told]
    assert [line.split("  ")[0] for line in lines[5:13]] == [
        "pixel accuracy",
        "mIoU small (2)",
        "mIoU medium (1)",
        "mIoU large (1)",
        *NAMES,
    ]
    assert "of 4 classes, where chance alone gives about 0.2" in lines[13]
    assert "40 images drawn 10000 times, seed 0" in lines[14]
    assert "not about training once more" in lines[15]
    assert lines[16:] == [result.verdict()]


def test_few_images_other_settings_and_the_same_counts_are_said(tmp_path):
    few = simulated(8, 0.6)
    a = write(tmp_path / "a.npz", few)
    b = write(tmp_path / "b.npz", few, inference={"flip": True})
    text = compare(a, b, samples=100).text()
    assert "with 8 images the intervals are too narrow" in text
    assert "A and B have the same counts in every image" in text
    assert "the inference differs: flip False and True" in text
    assert text.endswith("no difference can be told: B - A is +0.00 [+0.00, +0.00] points of mIoU")
    assert "differs" not in compare(a, a, samples=100).text()


def test_void_everywhere_tells_nothing(tmp_path):
    empty = [ConfusionMatrix(4), ConfusionMatrix(4)]
    a = write(tmp_path / "a.npz", empty)
    result = compare(a, a, samples=100)
    assert result.verdict() == "nothing can be told: no pixel counts"
    assert "nan" not in result.text()


# ---- the command -----------------------------------------------------------------------------
def test_two_runs_from_evaluation_to_sentence(tmp_path, capsys):
    config = config_of(write_folder(tmp_path / "data", count=4))
    runs = [write_run(tmp_path / name, config, seed=seed) for seed, name in enumerate("ab")]
    for run in runs:
        assert main(["eval", str(run), "--device", "cpu"]) == 0
    capsys.readouterr()
    options = ["--samples", "200", "--seed", "3"]
    assert main(["runs", "compare", *map(str, runs), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"A: {runs[0] / 'per_image_val.npz'}"
    assert lines[-1].endswith("points of mIoU")
    assert main(["runs", "compare", *map(str, runs), *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == lines[-1]
    assert (found["images"], found["samples"], found["seed"], found["level"]) == (4, 200, 3, 0.95)
    assert found["miou"]["difference"] == found["miou"]["b"] - found["miou"]["a"]
    assert set(found["iou"]) == {"sky", "tree", "road"}
    assert found["a"]["counts"] == str(runs[0] / "per_image_val.npz")
    assert found["b"]["split"] == "val"
    assert "8-connected" in found["size_groups"]["definition"]
    more = ["--json", "--split", "val", "--size-statistic", "image", "--samples", "100"]
    assert main(["runs", "compare", *map(str, runs), *more]) == 0
    assert "images that show it" in capsys.readouterr().out
    assert main(["runs", "compare", *map(str, runs), "--split", "test"]) == 2
    assert "--split test" in capsys.readouterr().err


def test_weights_newer_than_the_counts_are_told(tmp_path):
    config = config_of(write_folder(tmp_path / "data", count=2))
    run = write_run(tmp_path / "run", config)
    assert main(["eval", str(run), "--device", "cpu"]) == 0
    assert "is newer" not in compare(run, run, samples=100).text()
    best = run / "checkpoints" / "best.safetensors"
    later = time.time() + 60
    os.utime(best, (later, later))
    text = compare(run, run / counts_name("val"), samples=100).text()
    assert f"A: best.safetensors is newer than the counts; run again: segtrain eval {run}" in text
    assert "B: best" not in text


def test_mistakes_are_one_line_and_exit_code_2(tmp_path, pair, capsys):
    assert main(["runs", "compare", str(pair[0]), str(tmp_path / "x.npz")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(["runs", "compare", *map(str, pair), "--samples", "1"]) == 2
    assert "samples must be in 100..100000" in capsys.readouterr().err
