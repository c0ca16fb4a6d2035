"""Panoptic quality against the goldens, against the official code, and its rules one by one."""

import contextlib
import io
import json
import math
from pathlib import Path

import cityscapesscripts.evaluation.evalPanopticSemanticLabeling as official  # noqa: N813
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from d2ctx import UserError
from d2ctx.evaluation.panoptic_files import (
    ids_to_rgb,
    panoptic_quality,
    read_ids,
    read_json,
    rgb_to_ids,
    write_ids,
)
from d2ctx.evaluation.panoptic_quality import CategoryCounts, add_counts, count_image, summarize
from tests.shared_data import SHARED, needs_shared

GOLDENS = SHARED / "goldens" / "dev"
CATEGORIES = [
    {"id": 7, "name": "road", "isthing": 0},
    {"id": 24, "name": "person", "isthing": 1},
    {"id": 26, "name": "car", "isthing": 1},
]


def segment(number: int, category: int, area: int = 0, crowd: int = 0) -> dict:
    return {"id": number, "category_id": category, "area": area, "iscrowd": crowd}


def count(truth_ids, predicted_ids, truth, predicted) -> dict[int, tuple[int, int, int]]:
    """(TP, FP, FN) by category of maps given as nested lists; areas are counted."""
    truth_ids = np.array(truth_ids)
    counted = [{**s, "area": int((truth_ids == s["id"]).sum())} for s in truth]
    counts = count_image(
        truth_ids=truth_ids,
        predicted_ids=np.array(predicted_ids),
        truth=counted,
        predicted=predicted,
        categories=[c["id"] for c in CATEGORIES],
    )
    return {category: (c.tp, c.fp, c.fn) for category, c in counts.items()}


# ---- official numbers ------------------------------------------------------------------------
@needs_shared
def test_goldens_are_met_exactly():
    folder = GOLDENS / "panoptic_quality"
    expected = json.loads((GOLDENS / "panoptic_quality.json").read_text())
    found = panoptic_quality(
        truth=read_json(folder / "gt.json"),
        truth_root=folder / "gt",
        predicted=read_json(folder / "pred.json"),
        predicted_root=folder / "pred",
    )
    for category, counts in expected["per_class_counts"].items():
        mine = found["per_class"][int(category)]
        assert {key: mine[key] for key in counts} == counts
    for kind in ("All", "Things", "Stuff"):
        assert found[kind] == expected["results"][kind]


def random_side(generator, *, truth: bool, height: int, width: int):
    """Rectangles of random categories over void; ids are random three-byte numbers."""
    ids = np.zeros((height, width), np.int64)
    chosen = generator.choice(2**24 - 1, 8, replace=False) + 1
    for number in chosen[: generator.integers(0, 9)]:
        top, left = generator.integers(0, (height, width))
        bottom, right = generator.integers((top, left), (height, width)) + 1
        ids[top:bottom, left:right] = number
    segments = []
    for number in generator.permutation(np.unique(ids[ids > 0])):
        category = CATEGORIES[generator.integers(3)]
        crowd = truth and category["isthing"] and generator.random() < 0.4
        area = int((ids == number).sum())
        segments.append(segment(int(number), category["id"], area, int(crowd)))
    return ids, segments


def random_pair(generator):
    height, width = generator.integers(1, 9, 2)
    ids, segments = random_side(generator, truth=True, height=height, width=width)
    if generator.random() < 0.5:  # much alike: matches, and pairs at exactly one half
        other, listed = ids.copy(), [dict(s) for s in segments]
        other[: generator.integers(0, height + 1), : generator.integers(0, width + 1)] = 0
        listed = [s for s in listed if (other == s["id"]).any()]
    else:
        other, listed = random_side(generator, truth=False, height=height, width=width)
    return ids, segments, other, listed


def write_side(folder: Path, name: str, sides) -> dict:
    (folder / name).mkdir()
    annotations = []
    for number, (ids, segments) in enumerate(sides):
        file_name = f"{number}.png"
        write_ids(folder / name / file_name, ids)
        annotations.append({"image_id": number, "file_name": file_name, "segments_info": segments})
    content = {"annotations": annotations, "categories": CATEGORIES}
    (folder / f"{name}.json").write_text(json.dumps(content))
    return content


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_random_images_are_counted_as_by_the_official_code(tmp_path_factory, seed):
    folder = tmp_path_factory.mktemp("pq")
    ids, segments, other, listed = random_pair(np.random.default_rng(seed))
    truth = write_side(folder, "truth", [(ids, segments)])["annotations"][0]
    predicted = write_side(folder, "predicted", [(other, listed)])["annotations"][0]
    mine = count_image(
        truth_ids=ids,
        predicted_ids=other,
        truth=segments,
        predicted=listed,
        categories=[c["id"] for c in CATEGORIES],
    )
    known = {c["id"]: c for c in CATEGORIES}
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = official.pq_compute_single_core(
            0, [(truth, predicted)], folder / "truth", folder / "predicted", known
        )
    for category in known:
        a, b = mine.get(category, CategoryCounts()), theirs[category]
        assert (a.tp, a.fp, a.fn) == (b.tp, b.fp, b.fn)
        assert a.iou_sum == pytest.approx(b.iou, abs=1e-12)


def test_a_set_has_the_quality_that_evaluate_panoptic_reports(tmp_path):
    generator = np.random.default_rng(3)
    pairs = [random_pair(generator) for _ in range(40)]
    truth = write_side(tmp_path, "truth", [p[:2] for p in pairs])
    predicted = write_side(tmp_path, "predicted", [p[2:] for p in pairs])
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = official.evaluatePanoptic(
            tmp_path / "truth.json",
            tmp_path / "truth",
            tmp_path / "predicted.json",
            tmp_path / "predicted",
            tmp_path / "results.json",
        )
    mine = panoptic_quality(
        truth=truth,
        truth_root=tmp_path / "truth",
        predicted=predicted,
        predicted_root=tmp_path / "predicted",
    )
    for kind in ("All", "Things", "Stuff"):
        assert mine[kind] == pytest.approx(theirs[kind], abs=1e-12)
    for category, quality in theirs["per_class"].items():
        assert {k: mine["per_class"][category][k] for k in quality} == pytest.approx(quality)


# ---- the rules -------------------------------------------------------------------------------
def test_an_iou_of_exactly_one_half_is_no_match():
    half = count([[1, 1]], [[5, 0]], [segment(1, 24)], [segment(5, 24)])
    assert half == {24: (0, 1, 1)}
    more = count([[1, 1, 1]], [[5, 5, 0]], [segment(1, 24)], [segment(5, 24)])
    assert more == {24: (1, 0, 0)}


def test_predicted_pixels_on_void_do_not_enlarge_the_union():
    # 2 of 4 predicted pixels lie on void: IoU is 2 / 3, with void in the union it would be 2 / 5.
    found = count([[1, 1, 1, 0, 0]], [[5, 5, 0, 5, 5]], [segment(1, 24)], [segment(5, 24)])
    assert found == {24: (1, 0, 0)}


def test_a_prediction_mostly_on_void_is_forgiven_and_half_on_void_is_not():
    assert count([[0, 0, 1]], [[5, 5, 5]], [segment(1, 7)], [segment(5, 24)]) == {7: (0, 0, 1)}
    half = count([[0, 1]], [[5, 5]], [segment(1, 7)], [segment(5, 24)])
    assert half == {7: (0, 0, 1), 24: (0, 1, 0)}


def test_a_crowd_forgives_its_own_category_only_and_is_never_missed():
    crowd = segment(1, 24, crowd=1)
    assert count([[1, 1]], [[5, 0]], [crowd], [segment(5, 24)]) == {}
    assert count([[1, 1]], [[5, 0]], [crowd], [segment(5, 26)]) == {26: (0, 1, 0)}
    assert count([[1, 1]], [[0, 0]], [crowd], []) == {}


def test_only_the_crowd_listed_last_forgives():
    first, last = segment(9, 24, crowd=1), segment(1, 24, crowd=1)
    assert count([[9, 1]], [[5, 0]], [first, last], [segment(5, 24)]) == {24: (0, 1, 0)}
    assert count([[9, 1]], [[5, 0]], [last, first], [segment(5, 24)]) == {}


def test_void_everywhere_is_a_legal_prediction():
    assert count([[1, 2]], [[0, 0]], [segment(1, 24), segment(2, 7)], []) == {
        24: (0, 0, 1),
        7: (0, 0, 1),
    }


def test_single_pixels_and_empty_truth():
    assert count([[1]], [[5]], [segment(1, 7)], [segment(5, 7)]) == {7: (1, 0, 0)}
    assert count([[0]], [[0]], [], []) == {}


def test_the_order_of_images_changes_nothing_at_all():
    generator = np.random.default_rng(1)
    parts = [{7: CategoryCounts(ious=generator.random(3).tolist(), fp=1)} for _ in range(50)]
    forward, backward = add_counts(parts), add_counts(parts[::-1])
    assert summarize(forward, CATEGORIES[:1]) == summarize(backward, CATEGORIES[:1])


def test_a_kind_that_never_occurs_is_not_a_number_instead_of_a_crash():
    found = summarize({7: CategoryCounts(ious=[0.75], fn=1)}, CATEGORIES)
    assert found["Stuff"] == found["All"] == {"pq": 0.5, "sq": 0.75, "rq": 2 / 3, "n": 1}
    assert found["Things"]["n"] == 0
    assert math.isnan(found["Things"]["pq"])
    assert math.isnan(found["per_class"][24]["pq"])


# ---- errors ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("predicted", "message"),
    [
        ([], "prediction: the PNG holds segment 5, which the json does not list"),
        ([segment(5, 24), segment(6, 24)], "the json lists segment 6, which the PNG does not"),
        ([segment(5, 99)], "segment 5 has the unknown category 99"),
        ([segment(5, 24), segment(5, 7)], "the json lists segment 5 more than once"),
        ([segment(5, 24), segment(0, 7)], "the json lists segment 0, which is void"),
    ],
)
def test_a_json_and_a_png_that_disagree_are_refused_with_the_ids(predicted, message):
    with pytest.raises(UserError, match=message):
        count([[1]], [[5]], [segment(1, 24)], predicted)


def test_truth_that_disagrees_is_refused_as_well():
    with pytest.raises(UserError, match="image, ground truth: the PNG holds segment 1, which"):
        count([[1]], [[5]], [], [segment(5, 24)])


def test_sizes_must_agree():
    with pytest.raises(UserError, match="the prediction is 1x1, the ground truth 2x1"):
        count([[1, 1]], [[5]], [segment(1, 24)], [segment(5, 24)])


def test_an_image_without_prediction_is_named(tmp_path):
    truth = write_side(tmp_path, "truth", [(np.array([[1]]), [segment(1, 7, 1)])] * 2)
    with pytest.raises(UserError, match=r"1 image of 2 have no prediction \(1\)"):
        panoptic_quality(
            truth=truth,
            truth_root=tmp_path / "truth",
            predicted={"annotations": truth["annotations"][:1]},
            predicted_root=tmp_path / "truth",
        )


# ---- files -----------------------------------------------------------------------------------
def test_ids_take_three_bytes_red_first():
    ids = np.array([[1, 256, 65536, 2**24 - 1]])
    rgb = ids_to_rgb(ids)
    assert rgb.tolist() == [[[1, 0, 0], [0, 1, 0], [0, 0, 1], [255, 255, 255]]]
    assert (rgb_to_ids(rgb) == ids).all()
    with pytest.raises(ValueError, match=r"must lie in 0\.\.16777215, got 0\.\.16777216"):
        ids_to_rgb(np.array([0, 2**24]))


def test_reading_names_the_file_and_what_is_wrong(tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(UserError, match=r"a\.png does not exist"):
        read_ids(path)
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(path)
    with pytest.raises(UserError, match="has mode L, expected RGB"):
        read_ids(path)
    path.write_bytes(b"no image")
    with pytest.raises(UserError, match="is no image"):
        read_ids(path)
    write_ids(path, np.ones((64, 64), np.int32))
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match="cannot be decoded"):
        read_ids(path)
    path.write_text("{")
    with pytest.raises(UserError, match="is no valid json"):
        read_json(path)
