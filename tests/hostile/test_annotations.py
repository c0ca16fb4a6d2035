"""COCO's json with anything in any field: what the preflight passes, Detectron2 and COCO can read.

A crowd or an id that is wrong would stop a run at its first evaluation, hours later.
"""

import contextlib
import copy
import io
import json
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import detection_utils
from detectron2.data.datasets import load_coco_json
from detectron2.data.transforms import TransformList
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from d2ctx.errors import UserError
from d2ctx.evaluation.violations import coco_violations, run_lengths
from d2ctx.preflight.annotations import Wanted, check_annotations
from d2ctx.preflight.coco_json import check_classes, read_coco
from d2ctx.preflight.findings import Findings
from d2ctx.preflight.images import check_images
from d2ctx.preflight.sources import Source
from tests.d2ctx.toy_coco import ToySet, restored_catalogs, toy_config, write_toy

from .contract import CASES, generated, outcome
from .strategies import DEEP, JSON, LONG_NUMBER

SIDE = 32
NAN, INF = float("nan"), float("inf")
RLE = {"size": [SIDE, SIDE], "counts": [100, 50, SIDE * SIDE - 150]}
TEXT = {
    "size": [SIDE, SIDE],
    "counts": coco_mask.encode(np.asfortranarray(np.eye(SIDE, dtype=np.uint8)))["counts"].decode(),
}
SQUARE = [4, 4, 20, 4, 20, 20, 4, 20]
BOXES = (
    *([-5, -5, 10, 10], [99, 99, 5, 5], [0, 0, 0, 0], [5, 5, -3, 4], [1e308] * 4, [NAN] * 4),
    *([INF, 0, 1, 1], [0, 0, INF, INF], [None] * 4, ["1"] * 4, [1, 2, 3], [1, 2, 3, 4, 5]),
    *([10**400, 0, 1, 1], [[1], 2, 3, 4], [True] * 4, {"x": 1}, "1 2 3 4", [-1e9, -1e9, 2e9, 2e9]),
)
MASKS = (
    *([], [[]], [[1, 2]], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5]], [[1, 2, 3, 4, 5, 6, 7]], [SQUARE, []]),
    *([[1, 2, 3, 4], SQUARE], [[1, 2], SQUARE], [SQUARE, [1, 2, 3, 4]], [SQUARE, SQUARE]),
    *([[NAN] * 6], [[INF] * 6], [["1"] * 6], [[None] * 6], [[-5, -5, 99, -5, 99, 99]]),
    *([[0, 0, 1e9, 0, 1e9, 1e9]], [[-1e18] * 6], [[10**400] * 6], [SQUARE, "x"], SQUARE, [5] * 6),
    *("RLE", {}, {"size": [1, 1]}, {"counts": [5]}, RLE, {**RLE, "size": [SIDE, SIDE + 1]}),
    *({**RLE, "counts": [-5, SIDE * SIDE + 5]}, {**RLE, "counts": [SIDE * SIDE]}),
    *({**RLE, "counts": []}, {**RLE, "counts": [1.5, 2.5]}, {**RLE, "counts": ["1024"]}),
    *({**RLE, "counts": [2**40]}, {**RLE, "counts": [[1024]]}, {**RLE, "size": [2**20, 2**20]}),
    *(TEXT, {**TEXT, "counts": ""}, {**TEXT, "counts": "x"}, {**TEXT, "counts": "\xff\xfe"}),
    *({**TEXT, "counts": TEXT["counts"][:-2]}, {**TEXT, "counts": TEXT["counts"] * 2}),
    *({**TEXT, "counts": "o" * 400}, {**TEXT, "counts": None}, {**TEXT, "counts": "0\0" * 9}),
    *({**RLE, "size": "32x32"}, {**RLE, "size": [SIDE]}),
)
IDS = (0, -1, 1, 2, 7, 10**18, 2**63, 10**30, 10**400, True, 1.0, 1.5, "1", "", None, [1], {"a": 1})
FIELDS = {
    ("annotations", "bbox"): BOXES,
    ("annotations", "segmentation"): MASKS,
    ("annotations", "area"): (0, -1, 1e308, NAN, INF, "9", None, [9], True, 10**400),
    ("annotations", "iscrowd"): (0, 1, 2, -1, 0.5, True, "0", "yes", None, [], [1], {}),
    ("annotations", "ignore"): (0, 1, None, "x"),
    ("annotations", "id"): IDS,
    ("annotations", "image_id"): IDS,
    ("annotations", "category_id"): IDS,
    ("images", "id"): IDS,
    ("images", "width"): (0, -1, 1, SIDE - 1, 10**9, 10**30, True, 32.0, "32", None, [32]),
    ("images", "height"): (0, 1, 10**18, "32"),
    ("images", "file_name"): (
        *("", ".", "..", "../images", "/etc/hosts", "\0", "a\nb.jpg", "x" * 300, "nothing.jpg"),
        *(None, 5, ["a"], "\ud800.jpg", "toy_train.json", "日本語.jpg"),
    ),
    ("categories", "id"): IDS,
    ("categories", "name"): ("", None, 5, ["a"], "\ud800", "disc", "a\nb", "x" * 1000),
}
CASES_OF_FIELDS = [(*field, value) for field, values in FIELDS.items() for value in values]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    with pytest.MonkeyPatch.context() as patch, restored_catalogs():
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        toy = write_toy(folder / "data", images=3)
        toy_config(train=[toy], test=[], output=folder / "out")
        yield toy


def judged(toy: ToySet, written: bytes) -> list[str]:
    """What the preflight finds; where that is nothing, all that comes later must be able to go."""
    CASES["annotations"] += 1
    toy.json_file.write_bytes(written)
    source = Source(toy.name, train=True, test=True, section="COCO_FORMAT")
    findings = Findings()
    file = read_coco(source, findings)
    if file is not None:
        wanted = Wanted(masks=True, polygons=False, evaluation=True)
        check_classes([file], key=None, wanted=0, findings=findings)
        check_annotations(file, wanted, findings)
        check_images(file, decode=False, findings=findings)
    for error in findings.errors:
        assert error.startswith(toy.name)
        assert len(error) < 1500
    if not findings.errors:
        with contextlib.redirect_stdout(io.StringIO()):
            train_on(toy)
            evaluate_on(toy.json_file)
    return findings.errors


def train_on(toy: ToySet) -> None:
    """Detectron2's way from the json to the truth of a batch."""
    for record in load_coco_json(str(toy.json_file), str(toy.image_root), toy.name):
        size = record["height"], record["width"]
        kept = [
            detection_utils.transform_instance_annotations(a, TransformList([]), size)
            for a in record["annotations"]
            if a.get("iscrowd", 0) == 0
        ]
        detection_utils.annotations_to_instances(kept, size, mask_format="bitmask")


def evaluate_on(json_file: Path) -> None:
    """COCO's evaluation of one detection."""
    coco = COCO(str(json_file))
    image = coco.dataset["images"][0]["id"]
    category = coco.dataset["categories"][0]["id"]
    one = {"image_id": image, "category_id": category, "score": 0.5, "bbox": [1, 1, 5, 5]}
    mask = {"size": [SIDE, SIDE], "counts": RLE["counts"]}
    one["segmentation"] = coco_mask.frPyObjects(mask, SIDE, SIDE)
    for task in ("bbox", "segm"):
        results = [one if task == "segm" else {k: one[k] for k in one if k != "segmentation"}]
        scores = COCOeval(coco, coco.loadRes(results), task)
        scores.evaluate()
        scores.accumulate()


def changed(toy: ToySet, kind: str, field: str, value, *, which: int = 1) -> bytes:
    content = copy.deepcopy(toy.content)
    content[kind][which][field] = value
    return json.dumps(content).encode()


# ---- the json --------------------------------------------------------------------------------
def test_the_set_itself_is_sound(toy):
    assert not judged(toy, json.dumps(toy.content).encode())


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("kind", "field", "value"), CASES_OF_FIELDS, ids=lambda v: f"{v!s:.24}")
def test_every_field_with_wrong_values(toy, kind, field, value):
    judged(toy, changed(toy, kind, field, value))


@given(field=st.sampled_from(sorted(FIELDS)), value=JSON, which=st.integers(0, 2))
@generated(250)
def test_every_field_with_anything(toy, field, value, which):
    judged(toy, changed(toy, *field, value, which=which))


@given(
    choices=st.lists(
        st.sampled_from(sorted(FIELDS)).flatmap(
            lambda field: st.tuples(
                st.just(field), st.sampled_from(range(len(FIELDS[field]))), st.integers(0, 2)
            )
        ),
        min_size=2,
        max_size=4,
    )
)
@generated(150)
def test_several_wrong_fields(toy, choices):
    content = copy.deepcopy(toy.content)
    for (kind, field), number, which in choices:
        content[kind][which][field] = FIELDS[kind, field][number]
    judged(toy, json.dumps(content).encode())


@pytest.mark.parametrize(("kind", "field"), sorted(FIELDS), ids=str)
def test_every_field_may_be_absent(toy, kind, field):
    content = copy.deepcopy(toy.content)
    content[kind][1].pop(field, None)
    judged(toy, json.dumps(content).encode())


@given(content=JSON, key=st.sampled_from([None, "images", "annotations", "categories"]))
@generated(120)
def test_json_of_any_form(toy, content, key):
    written = content if key is None else {**toy.content, key: content}
    errors = judged(toy, json.dumps(written).encode())
    assert errors or content in ([], toy.content)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "written",
    [
        *(b"", b"\0", b"nan", b"{", b"\xff\xfe", b"{}\n{}", DEEP, LONG_NUMBER, b'{"a": 1e999}'),
        *(
            b'{"images": ' + DEEP,
            b"[" + LONG_NUMBER + b"]",
            "{}".encode("utf-16"),
            b"\xef\xbb\xbf{}",
        ),
    ],
    ids=lambda text: str(text[:12]),
)
def test_files_that_are_no_json(toy, written):
    (error,) = judged(toy, written)[:1]
    assert str(toy.json_file) in error


@given(start=st.floats(0, 1), length=st.integers(0, 20), middle=st.binary(max_size=8))
@generated(100)
def test_damaged_json(toy, start, length, middle):
    text = json.dumps(toy.content).encode()
    cut = int(start * len(text))
    judged(toy, text[:cut] + middle + text[cut + length :])


def test_what_passed_and_what_did_not(toy):
    """The property above says nothing where everything is refused."""
    passing = [
        case
        for case in CASES_OF_FIELDS
        if case[1] in ("bbox", "segmentation", "area", "iscrowd")
        and not judged(toy, changed(toy, *case))
    ]
    assert {case[1] for case in passing} == {"bbox", "segmentation", "area", "iscrowd"}
    refused = {("area", "9"), ("iscrowd", "yes"), ("iscrowd", 2)}
    assert not refused & {(f, v) for _, f, v in passing if isinstance(v, str | int)}


# ---- run lengths -----------------------------------------------------------------------------
@given(bits=st.lists(st.integers(0, 1), min_size=1, max_size=60))
@generated(60)
def test_run_lengths_are_those_of_coco(bits):
    CASES["run lengths"] += 1
    counts = coco_mask.encode(np.asfortranarray(np.array([bits], np.uint8)))["counts"].decode()
    expected = [len(list(run)) for run in _runs(bits)]
    assert run_lengths(counts) == ([0] * bits[0] + expected)


def _runs(bits):
    return [list(group) for _, group in groupby(bits)]


@pytest.mark.timeout(10)
@pytest.mark.parametrize("counts", ["o" * 3_000_000, "\x00", "é", "", "0" * 100_000], ids=ascii)
def test_run_lengths_of_nonsense_end(counts):
    CASES["run lengths"] += 1
    found = run_lengths(counts)
    assert found is None or sum(found) == 0


# ---- results ---------------------------------------------------------------------------------
RESULT = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5], "score": 0.5, "segmentation": TEXT}


@given(
    field=st.sampled_from([None, *RESULT]),
    value=JSON | st.sampled_from([*BOXES, *MASKS]),
    task=st.sampled_from(["bbox", "segm", "both"]),
)
@generated(200)
def test_results_of_any_form_are_judged(toy, field, value, task):
    results = value if field is None else [{**RESULT, field: value}]
    lines, _ = outcome(
        lambda: list(coco_violations(results, toy.content, task=task)),
        error=UserError,
        names=["result"],
        what="results",
    )
    assert all(len(line) < 600 for line in lines)
    if field is None and value != []:
        assert lines
