"""`python -m d2ctx.compare`: exact scores of resampled images, what is refused, what is said."""

import json
import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances

from d2ctx.compare import ap, paired
from d2ctx.compare.ap import ApScorer
from d2ctx.compare.cli import main
from d2ctx.compare.comparison import compare
from d2ctx.compare.miou import MiouScorer
from d2ctx.compare.paired import paired_bootstrap, times_drawn
from d2ctx.compare.pq import PqScorer
from d2ctx.errors import UserError
from d2ctx.evaluation.ap_matching import AREAS, THRESHOLDS
from d2ctx.evaluation.ap_records import KIND, ApRecord, read_detections, record_detections
from d2ctx.evaluation.build import build_evaluator
from d2ctx.evaluation.coco_scores import average_precision, coco_api, pycocotools_api
from d2ctx.evaluation.panoptic_quality import CategoryCounts, add_counts, summarize
from d2ctx.evaluation.pq_records import read_segments, record_segments
from d2ctx.evaluation.record_files import record_name
from d2ctx.evaluation.semantic_records import count_labels, read_labels, record_labels

from .toy_coco import toy_config, write_toy
from .toy_detections import drawn_set, invented
from .toy_panoptic import IDS, panoptic_config, panoptic_ids, write_panoptic

EXACT = {"abs": 1e-12, "nan_ok": True}
APIS = {"fast": coco_api, "original": pycocotools_api}
CATEGORIES = [{"id": 2 * k + 1, "name": n, "isthing": n in "ab"} for k, n in enumerate("abcd")]


def evaluated(truth, found, task="bbox", api=None) -> list[float]:
    """What COCO's evaluation says, in the order of the scorer."""
    scores = average_precision(truth, found, task=task, api=api)
    head = [scores.statistics[name] for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")]
    return [v / 100 for v in [*head, *(values["AP"] for values in scores.per_class.values())]]


def recorded(truth, found, task="bbox") -> ApRecord:
    return record_detections(truth, found, task=task, dataset="toy")


def all_images(record) -> np.ndarray:
    return np.ones((1, len(record.images)))


def scored(record) -> list[float]:
    return ApScorer(record).scores(all_images(record))[0].tolist()


# ---- average precision -----------------------------------------------------------------------
@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("decimals", [1, 9])
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_scores_of_all_images_are_those_of_the_evaluation(task, decimals, api):
    truth, found = invented(decimals=decimals, masks=task == "segm")
    wanted = evaluated(truth, found, task, APIS[api]())
    assert 0.1 < wanted[0] < 0.9
    assert not np.isnan(wanted).any()
    assert scored(recorded(truth, found, task)) == pytest.approx(wanted, **EXACT)


@pytest.mark.parametrize("decimals", [2, 9])
@pytest.mark.parametrize("most", [1, 1 << 20])
def test_scores_of_drawn_images_are_those_of_a_data_set_that_repeats_them(
    monkeypatch, most, decimals
):
    monkeypatch.setattr(ap, "_MOST", most)
    truth, found = invented(15, decimals=decimals)
    weights = times_drawn(np.random.default_rng(1), 8, 15)
    weights[0] = 0
    weights[0, 3] = 15  # one image and nothing else: classes and sizes are missing
    scores = ApScorer(recorded(truth, found)).scores(weights)
    for times, row in zip(weights, scores, strict=True):
        assert row.tolist() == pytest.approx(evaluated(*drawn_set(truth, found, times)), **EXACT)
    assert np.isnan(scores[0]).any()


def one_class(*boxes, **image):
    images = [{"id": n, "height": 400, "width": 400, **image} for n in (1, 2)]
    annotations = [
        {"id": n, "image_id": n, "category_id": 1, "bbox": [*box], "area": box[2] * box[3]}
        for n, box in enumerate(boxes, start=1)
    ]
    return {
        "images": images,
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [{**a, "iscrowd": 0} for a in annotations],
    }


def test_a_real_object_is_taken_before_a_crowd_that_overlaps_more():
    truth = one_class((10, 10, 50, 50), (0, 0, 200, 200))
    truth["annotations"][1] |= {"image_id": 1, "iscrowd": 1}
    found = [{"image_id": 1, "category_id": 1, "bbox": [15, 15, 50, 50], "score": 0.9}]
    assert scored(recorded(truth, found)) == pytest.approx(evaluated(truth, found), **EXACT)
    assert 0.3 < scored(recorded(truth, found))[0] < 0.9


def test_no_more_than_a_hundred_detections_of_an_image_and_class_count():
    box = (10, 10, 50, 50)
    truth = one_class(box, box)
    wrong = {"image_id": 1, "category_id": 1, "bbox": [200, 200, 5, 5], "score": 0.9}
    found = [wrong] * 100 + [{**wrong, "bbox": [*box]}, {**wrong, "image_id": 2, "bbox": [*box]}]
    assert scored(recorded(truth, found)) == pytest.approx(evaluated(truth, found), **EXACT)
    assert 0 < scored(recorded(truth, found))[0] < 0.01


def test_names_for_images_foreign_detections_and_nothing_found():
    truth, found = invented(12)
    wanted = evaluated(truth, found)
    for entry in (*truth["images"], *truth["annotations"], *found):
        key = "image_id" if "image_id" in entry else "id"
        entry[key] = f"image {entry[key]:03d}"
    assert scored(recorded(truth, found)) == pytest.approx(wanted, **EXACT)
    nothing = scored(recorded(truth, []))
    assert nothing == pytest.approx(evaluated(truth, []), **EXACT)
    foreign = [{**found[0], "category_id": 99}, {**found[0], "image_id": "nowhere"}]
    assert scored(recorded(truth, foreign)) == nothing


@pytest.mark.filterwarnings("ignore:Found annotation id 0")
def test_an_object_with_the_id_0_is_never_found_as_in_cocos_evaluation():
    truth = one_class((10, 10, 50, 50), (10, 10, 50, 50))
    truth["annotations"][0]["id"] = 0
    found = [
        {"image_id": n, "category_id": 1, "bbox": [10, 10, 50, 50], "score": 0.9} for n in (1, 2)
    ]
    assert scored(recorded(truth, found)) == pytest.approx(evaluated(truth, found), **EXACT)


# ---- panoptic quality ------------------------------------------------------------------------
def counted(images: int = 12, *, quality: float = 0.7, seed: int = 0):
    """Counts of invented images; the last class is rare, fp and fn depend on the quality."""
    truth_rng, rng = np.random.default_rng(seed), np.random.default_rng([seed, int(1e6 * quality)])
    found = []
    for _ in range(images):
        of_image = {}
        for category, often in zip(CATEGORIES, (0.9, 0.6, 0.8, 0.1), strict=True):
            if truth_rng.random() < often:
                segments = int(truth_rng.integers(1, 4))
                right = int(rng.binomial(segments, quality))
                ious = rng.uniform(0.55, 0.95, right).tolist()
                wrong = int(rng.integers(0, 2))
                of_image[category["id"]] = CategoryCounts(ious, fp=wrong, fn=segments - right)
        found.append(of_image)
    return found


def segments(counts, dataset="toy"):
    annotations = [{"image_id": n, "segments_info": []} for n in range(len(counts))]
    truth = {"annotations": annotations, "categories": CATEGORIES}
    return record_segments(truth, counts, task="panoptic_seg", dataset=dataset)


def summed(counts) -> list[float]:
    found = summarize(add_counts(counts), CATEGORIES)
    head = [found["All"][key] for key in ("pq", "sq", "rq")]
    head += [found[kind]["pq"] for kind in ("Things", "Stuff")]
    return head + [found["per_class"][c["id"]]["pq"] for c in CATEGORIES]


def test_panoptic_quality_of_drawn_images_is_that_of_their_counts():
    counts = counted()
    weights = times_drawn(np.random.default_rng(0), 60, len(counts))
    weights[0] = 1
    scores = PqScorer(segments(counts)).scores(weights)
    for times, row in zip(weights, scores, strict=True):
        repeated = [c for c, n in zip(counts, times, strict=True) for _ in range(int(n))]
        assert row.tolist() == pytest.approx(summed(repeated), **EXACT)
    assert np.isnan(scores).any()


# ---- mean IoU --------------------------------------------------------------------------------
def labelled(images: int = 9, *, quality: float = 0.7, seed: int = 0):
    """Label maps and what was predicted: three classes and void; the last class is rare."""
    truth_rng, rng = np.random.default_rng(seed), np.random.default_rng([seed, int(1e6 * quality)])
    for _ in range(images):
        rare = 3 if truth_rng.random() < 0.3 else 2
        truth = truth_rng.integers(0, rare, (6, 5)).astype(np.uint8)
        truth[0, truth_rng.integers(0, 5)] = 255
        guess = rng.integers(0, rare, truth.shape)
        yield truth, np.where(rng.random(truth.shape) < quality, truth % 255 % 3, guess)


def labels(pairs):
    counts = [
        count_labels(f"{n:03d}", *pair, num_classes=3, ignored=255) for n, pair in enumerate(pairs)
    ]
    return record_labels(counts, classes=["things", "sky", "sea"], dataset="toy")


def test_mean_iou_of_drawn_images_is_that_of_all_their_pixels():
    pairs = list(labelled())
    weights = times_drawn(np.random.default_rng(0), 40, len(pairs))
    scores = MiouScorer(labels(pairs)).scores(weights)
    for times, row in zip(weights, scores, strict=True):
        drawn = [pair for pair, n in zip(pairs, times, strict=True) for _ in range(int(n))]
        sides = zip(*drawn, strict=True)
        truth, guess = (np.concatenate([one.ravel() for one in side]) for side in sides)
        truth, guess = truth[truth != 255], guess[truth != 255]
        either = [((truth == k) | (guess == k)).sum() for k in range(3)]
        iou = [
            ((truth == k) & (guess == k)).sum() / n if n else math.nan for k, n in enumerate(either)
        ]
        wanted = [np.nanmean(iou), (truth == guess).mean(), *iou]
        assert row.tolist() == pytest.approx(wanted, **EXACT)
    assert np.isnan(scores).any()


# ---- the bootstrap ---------------------------------------------------------------------------
def test_equals_a_slow_loop(monkeypatch):
    monkeypatch.setattr(paired, "_ROWS", 7)
    sides = [PqScorer(segments(counted(9, quality=q))) for q in (0.6, 0.75)]
    found = paired_bootstrap([side.scores for side in sides], 9, samples=100, seed=3)
    generator = np.random.default_rng(3)
    draws = np.concatenate([times_drawn(generator, n, 9) for n in [7] * 14 + [2]])
    assert (draws.sum(axis=1) == 9).all()
    of_a, of_b = (side.scores(draws) for side in sides)
    for gain, column in zip(found, (of_b - of_a).T, strict=True):
        known = column[~np.isnan(column)]
        assert (gain.low, gain.high) == pytest.approx(
            tuple(np.percentile(known, [2.5, 97.5])), abs=1e-14
        )
        better = np.mean([1 if d > 0 else 0.5 if d == 0 else 0 for d in known])
        assert gain.b_is_better == pytest.approx(better, abs=1e-14)
    assert [g.a for g in found] == pytest.approx(summed(counted(9, quality=0.6)), **EXACT)


def test_a_run_compared_with_itself_differs_by_exactly_nothing():
    for scorer, images in (
        (ApScorer(recorded(*invented(20))), 20),
        (PqScorer(segments(counted())), 12),
    ):
        for gain in paired_bootstrap([scorer.scores] * 2, images, samples=100, seed=0):
            assert gain.difference == gain.low == gain.high == 0
            assert gain.b_is_better == 0.5
            assert not gain.is_told


def test_a_better_detector_is_told_and_mirrored():
    a, b = (ApScorer(recorded(*invented(60, noise=noise))).scores for noise in (0.1, 0.05))
    forth, back = (paired_bootstrap(s, 60, samples=200, seed=1) for s in ((a, b), (b, a)))
    assert forth[0].is_told
    assert forth[0].low > 0
    assert forth[0].b_is_better == 1
    for one, other in zip(forth, back, strict=True):
        assert one.difference == -other.difference
        assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-14)
        assert one.b_is_better == pytest.approx(1 - other.b_is_better, abs=1e-14)


@cache
def simulated(images: int, quality: float) -> ApRecord:
    """Small objects of one class; each is found with probability `quality`, at all thresholds."""
    truth, rng = np.random.default_rng(5), np.random.default_rng(int(1e6 * quality))
    objects = np.repeat(np.arange(images), truth.integers(0, 5, images))
    right = rng.random(len(objects)) < quality
    wrong = rng.integers(0, images, images // 2)
    scores = np.concatenate([rng.beta(4, 2, right.sum()), rng.beta(2, 4, len(wrong))])
    place = np.concatenate([objects[right], wrong])
    flags = np.arange(len(place)) < right.sum()
    order = np.lexsort((-scores, place))
    shape = len(place), len(THRESHOLDS), len(AREAS)
    small = np.array([True, True, False, False])
    return ApRecord(
        about={"kind": KIND, "dataset": "toy", "task": "bbox", "classes": ["a"]},
        images=tuple(map(str, range(images))),
        digests=np.zeros(images, np.uint32),
        found=np.stack([place[order], np.zeros(len(place))]).astype(np.int32),
        scores=scores[order],
        right=np.broadcast_to(flags[order][:, None, None] & small, shape),
        counts=np.broadcast_to(small, shape),
        objects=np.stack([objects, np.zeros(len(objects))]).astype(np.int32),
        areas=np.full(len(objects), 100.0),
    )


def part_of(record: ApRecord, images: np.ndarray) -> ApRecord:
    """The record of some images."""
    number = np.full(len(record.images), -1)
    number[np.sort(images)] = np.arange(len(images))
    place, known = number[record.found[0]], number[record.objects[0]]
    inside, known_inside = place >= 0, known >= 0
    rows = {name: getattr(record, name)[inside] for name in ("scores", "right", "counts")}
    return replace(
        record,
        **rows,
        images=tuple(map(str, range(len(images)))),
        found=np.stack([place, record.found[1]])[:, inside].astype(np.int32),
        objects=np.stack([known, record.objects[1]])[:, known_inside].astype(np.int32),
        areas=record.areas[known_inside],
    )


def test_intervals_hold_the_truth_as_often_as_they_promise():
    # 80 sets of 60 images from a population of 3000, whose difference is known.
    sides = [ApScorer(simulated(3000, quality)) for quality in (0.60, 0.64)]
    everything = np.ones((1, 3000))
    true = sides[1].scores(everything)[0, 0] - sides[0].scores(everything)[0, 0]
    assert true > 0.01
    rng, held = np.random.default_rng(0), 0
    for _ in range(80):
        some = rng.choice(3000, 60, replace=False)
        scorers = [ApScorer(part_of(simulated(3000, q), some)).scores for q in (0.60, 0.64)]
        gain = paired_bootstrap(scorers, 60, samples=100, seed=0)[0]
        held += gain.low <= true <= gain.high
    # Binomial: 95 % of 80 are 76 +- 2; percentiles of 100 samples are a little too narrow.
    assert 69 <= held <= 80


def test_without_a_difference_one_is_rarely_told():
    told = 0
    for seed in range(60):
        sides = [PqScorer(segments(counted(60, quality=q, seed=seed))) for q in (0.6, 0.600001)]
        scorers = [side.scores for side in sides]
        told += paired_bootstrap(scorers, 60, samples=200, seed=seed)[0].is_told
    assert told <= 9  # 3 expected; more than 9 in one of a thousand


# ---- files -----------------------------------------------------------------------------------
def write_run(folder, record):
    place = folder / "inference" / record.about["dataset"]
    place.mkdir(parents=True, exist_ok=True)
    record.write(place)
    return folder


@pytest.fixture
def runs(tmp_path):
    """Two runs with boxes and panoptic results."""
    for name, noise, quality in (("a", 0.1, 0.6), ("b", 0.04, 0.9)):
        write_run(tmp_path / name, recorded(*invented(noise=noise)))
        write_run(tmp_path / name, segments(counted(40, quality=quality)))
    return tmp_path / "a", tmp_path / "b"


def test_files_hold_everything_and_are_small(tmp_path):
    for record, read in (
        (recorded(*invented(40)), read_detections),
        (segments(counted()), read_segments),
        (labels(labelled()), read_labels),
    ):
        record.write(tmp_path)
        path = tmp_path / record_name(record.about["task"])
        again = read(path)
        assert again.about == {"version": 1, **record.about}
        for name, value in vars(record).items():
            if name != "about":
                assert np.array_equal(getattr(again, name), value), name
        assert again.same_as(record)
        assert path.stat().st_size < 20_000


def rewrite(path, **changes):
    with np.load(path) as stored:
        arrays = dict(stored)
    if "about" in changes:
        changes["about"] = np.array(json.dumps(json.loads(str(arrays["about"])) | changes["about"]))
    np.savez(path, **(arrays | changes), allow_pickle=True)


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"about": {"version": 2}}, "version 2, this program reads 1"),
        ({"about": {"classes": "abc"}}, "'about' has no classes"),
        ({"about": {"classes": ["a"]}}, "'found' names an image or a class that is not there"),
        ({"about": {"kind": "panoptic quality"}}, "panoptic quality instead of average precision"),
        ({"scores": np.zeros(3)}, "'found' and 'scores' are of different length"),
        ({"scores": np.array([[0.5]])}, "'scores' is float64"),
        ({"digests": np.zeros(1, np.uint32)}, "'digests' does not fit 'images'"),
        ({"images": np.array([Evil()] * 40)}, "Object arrays cannot be loaded"),
        ({"right": np.zeros((1, 5), np.uint8)}, "'right' is uint8"),
        ({"areas": np.array([math.nan])}, "'areas' is negative or not finite"),
    ],
)
def test_damaged_files_are_refused(tmp_path, capsys, changes, reason):
    recorded(*invented()).write(tmp_path)
    path = tmp_path / record_name("bbox")
    rewrite(path, **changes)
    with pytest.raises(UserError, match=reason) as error:
        read_detections(path)
    assert str(error.value).endswith("evaluate the run again, which writes it")
    assert "code ran" not in capsys.readouterr().out


def test_what_is_no_such_file_is_refused(tmp_path):
    path = tmp_path / record_name("bbox")
    with pytest.raises(UserError, match="no file .*; evaluate the run again"):
        read_detections(path)
    recorded(*invented()).write(tmp_path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match="holds no records of images"):
        read_detections(path)


# ---- what has to agree -----------------------------------------------------------------------
def refused(runs, text, **options):
    with pytest.raises(UserError, match=text) as error:
        compare(*runs, **options)
    assert "\n" not in str(error.value)


def other(runs, truth, found, dataset="toy"):
    """Replace B's boxes."""
    write_run(runs[1], record_detections(truth, found, task="bbox", dataset=dataset))


def test_other_images_are_refused(runs):
    other(runs, *invented(41))
    refused(runs, r"has 40 images, .* 41, they differ in 41; evaluate both on the same images")


def test_another_ground_truth_is_refused(runs):
    truth, found = invented(noise=0.04)
    truth["annotations"][0]["bbox"][0] += 1
    other(runs, truth, found)
    image = truth["annotations"][0]["image_id"]
    refused(runs, rf"another ground truth in {image}; evaluate both with the same annotations")


def test_other_classes_are_refused(runs):
    truth, found = invented(noise=0.04)
    truth["categories"][2]["name"] = "d"
    other(runs, truth, found)
    refused(runs, r"has 3 classes \(c\), .* 3 classes \(d\); only results on the same classes")


def test_one_image_tells_nothing(tmp_path):
    run = write_run(tmp_path / "one", recorded(*invented(1)))
    refused((run, run), "has one image; two at least")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"samples": 99}, r"--samples must be in 100..100000, got 99"),
        ({"samples": 100_001}, r"got 100001"),
        ({"seed": -1}, r"--seed must not be negative, got -1"),
        ({"tasks": ["segm"]}, r"no records of segm, but of bbox, panoptic_seg; name one that"),
        ({"dataset": "coco"}, r"has no records of coco, but of toy; name one of them"),
    ],
)
def test_options_that_cannot_be_met_are_refused(runs, options, text):
    refused(runs, text, **options)


def test_runs_are_found_or_refused_with_the_fix(runs, tmp_path):
    refused((runs[0], tmp_path / "c"), r"c is no folder; give the output folder of an evaluated")
    (tmp_path / "c").mkdir()
    refused((runs[0], tmp_path / "c"), r"no records of images; evaluate the run again, .*--eval-o")
    write_run(tmp_path / "c", segments(counted(), dataset="coco"))
    refused((runs[0], tmp_path / "c"), r"a was evaluated on toy, .*c on coco; only results on the")
    for run in runs:
        write_run(run, segments(counted(), dataset="coco"))
    refused(runs, r"share several data sets; add --dataset, one of coco, toy")
    found = compare(*runs, dataset="coco", samples=100)
    assert [task.dataset for task in found.tasks] == ["coco"]
    folders = [run / "inference" / "toy" for run in runs]
    assert len(compare(*folders, samples=100).tasks) == 2
    write_run(tmp_path / "d", recorded(*invented()))
    write_run(tmp_path / "e", segments(counted()))
    refused((tmp_path / "d", tmp_path / "e"), r"of bbox, .* of panoptic_seg: none in common")


# ---- what is said ----------------------------------------------------------------------------
def test_the_better_side_is_named_whichever_it_is(runs):
    for task, called in (("bbox", "box AP"), ("panoptic_seg", "PQ")):
        (forth,), (back,) = (
            compare(*sides, tasks=[task], samples=200).tasks for sides in (runs, runs[::-1])
        )
        gain = forth.main
        points = [f"{100 * value:.2f}" for value in (gain.difference, gain.low, gain.high)]
        sentence = f"is better by {points[0]} [{points[1]}, {points[2]}] points; B is better with"
        assert forth.verdict() == f"{called}: B {sentence} probability 1.000"
        assert back.verdict() == f"{called}: A {sentence} probability 0.000"


def test_the_table(runs, capsys):
    assert main([*map(str, runs), "--samples", "100", "--metric", "bbox"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        f"A: {runs[0]}",
        f"B: {runs[1]}",
        "40 images drawn 100 times, seed 0; the same for A and B",
        "the intervals are about other images, not about training once more",
    ]
    (task,) = compare(*runs, tasks=["bbox"], samples=100).tasks
    assert lines[5] == "bbox on toy"
    assert lines[6].split() == ["A", "B", "B", "-", "A", "95%", "interval", "P(B", ">", "A)"]
    gain = task.main
    told = [f"{100 * gain.a:.2f}", f"{100 * gain.b:.2f}", f"{100 * gain.difference:+.2f}"]
    told += [f"[{100 * gain.low:+.2f},", f"{100 * gain.high:+.2f}]", "1.000", "*"]
    assert lines[8].split() == ["AP", *told]
    names = ["AP", "AP50", "AP75", "AP small", "AP medium", "AP large", "a", "b", "c"]
    assert [line.split("  ")[0] for line in lines[8:17]] == names
    assert lines[17].endswith("of 3 classes, where chance alone gives about 0.2")
    assert lines[18:] == [task.verdict()]


def test_json_holds_everything(runs, capsys):
    assert main([*map(str, runs), "--samples", "150", "--seed", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["seed"], found["level"]) == (150, 2, 0.95)
    assert (found["a"], found["b"]) == tuple(map(str, runs))
    assert set(found["tasks"]) == {"bbox", "panoptic_seg"}
    scores = found["tasks"]["bbox"]["scores"]
    assert [scores["AP"][side] for side in "ab"] == [
        pytest.approx(evaluated(*invented(noise=noise))[0], abs=1e-12) for noise in (0.1, 0.04)
    ]
    assert scores["AP"]["difference"] == scores["AP"]["b"] - scores["AP"]["a"]
    assert set(found["tasks"]["panoptic_seg"]["classes"]) == set("abcd")
    assert found["tasks"]["bbox"]["images"] == 40


def test_few_images_and_equal_runs_are_said(tmp_path):
    run = write_run(tmp_path / "few", recorded(*invented(8)))
    found = compare(run, run, samples=100)
    text = found.text()
    assert "with 8 images the intervals are too narrow" in text
    assert "A and B have the same bbox results in every image" in text
    assert "no difference can be told: B - A is +0.00 [+0.00, +0.00] points" in text
    assert text.endswith("B is better with probability 0.500")


def test_without_objects_nothing_can_be_told(tmp_path):
    truth, found = invented(5)
    truth["annotations"] = []
    run = write_run(tmp_path / "none", recorded(truth, found))
    result = compare(run, run, samples=100)
    assert result.tasks[0].verdict() == "box AP: nothing can be told, nothing is annotated"
    assert "nan" not in result.text()
    assert result.as_dict()["tasks"]["bbox"]["scores"]["AP"]["a"] is None


def test_mistakes_are_one_line_and_exit_code_2(tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# ---- the evaluators --------------------------------------------------------------------------
def detect(record, shift):
    """The only object of a toy image, moved."""
    x, y, width, height = record["annotations"][0]["bbox"]
    found = Instances((record["height"], record["width"]))
    found.pred_boxes = Boxes(torch.tensor([[x + shift, y, x + width + shift, y + height]]).float())
    found.pred_classes = torch.tensor([record["annotations"][0]["category_id"]])
    found.scores = torch.tensor([0.5])
    mask = torch.zeros(1, record["height"], record["width"], dtype=torch.bool)
    mask[0, y : y + height, x + shift : x + width + shift] = True
    found.pred_masks = mask
    return {"instances": found}


@pytest.mark.usefixtures("isolated")
def test_an_evaluation_of_detections_leaves_its_records(tmp_path):
    toy, results = write_toy(tmp_path / "data", "toy_val", images=6), []
    for shift in (3, 1):
        cfg = toy_config(train=[], test=[toy], output=tmp_path / f"run{shift}")
        records = DatasetCatalog.get("toy_val")
        evaluator = build_evaluator(cfg, "toy_val")
        evaluator.reset()
        evaluator.process(records, [detect(record, shift) for record in records])
        results.append(evaluator.evaluate())
    for task in compare(tmp_path / "run3", tmp_path / "run1", samples=100).tasks:
        sides = (task.main.a, task.main.b)
        assert sides == pytest.approx([r[task.task]["AP"] / 100 for r in results], abs=1e-12)
        assert 0 < task.main.a < task.main.b < 1
        assert task.dataset == "toy_val"


@pytest.mark.usefixtures("isolated")
def test_an_evaluation_of_segments_leaves_its_records(tmp_path):
    toy, results = write_panoptic(tmp_path / "data", images=3), []
    ids = panoptic_ids()
    for name, rows in (("a", 16), ("b", 32)):
        cfg = panoptic_config(
            train=[], test=[toy.name], output=tmp_path / name, COCO_PANOPTIC={toy.name: toy.entry()}
        )
        records = DatasetCatalog.get(toy.name)
        found = np.where(np.arange(len(ids))[:, None] < rows, ids, 0)
        info = [
            {"id": IDS[4], "isthing": False, "category_id": 1},
            {"id": IDS[7], "isthing": True, "category_id": 0},
            {"id": IDS[9], "isthing": False, "category_id": 2},
            {"id": IDS[12], "isthing": True, "category_id": 1},
        ]
        evaluator = build_evaluator(cfg, toy.name)._evaluators[0]
        evaluator.reset()
        labels = np.where(found == IDS[4], 1, np.where(found == IDS[9], 2, 0))
        logits = torch.nn.functional.one_hot(torch.from_numpy(labels), 3).permute(2, 0, 1).float()
        output = {"panoptic_seg": (torch.from_numpy(found), info), "sem_seg": logits}
        evaluator.process(records, [output] * len(records))
        results.append(evaluator.evaluate()["panoptic_seg"])
    task, semantic = compare(tmp_path / "a", tmp_path / "b", samples=100).tasks
    assert (semantic.task, list(semantic.classes)) == ("sem_seg", ["things", "sky", "ground"])
    assert 0 < semantic.main.a < semantic.main.b == 1
    assert semantic.verdict().startswith("mIoU of the semantic branch: B is better by")
    for name in ("PQ", "SQ", "RQ"):
        gain = task.scores[name]
        assert (gain.a, gain.b) == pytest.approx([r[name] / 100 for r in results], abs=1e-12)
    assert 0 < task.main.a < task.main.b
    assert task.scores["PQ things"].b == pytest.approx(results[1]["PQ_th"] / 100, abs=1e-12)
