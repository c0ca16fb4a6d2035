"""The check of submissions: every violation is listed, and sound files pass."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from d2ctx.evaluation.panoptic_files import write_ids
from d2ctx.evaluation.validate import main
from d2ctx.evaluation.violations import MAX_DETECTIONS, coco_violations, run_lengths

from .toy_panoptic import IDS, panoptic_ids, segments_of, write_cityscapes, write_panoptic

TRUTH = {
    "images": [{"id": 5, "width": 6, "height": 4}, {"id": 6, "width": 6, "height": 4}],
    "categories": [{"id": 7, "name": "a"}, {"id": 90, "name": "b"}],
}


def encoded(mask: np.ndarray) -> dict:
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def detection(**changes) -> dict:
    mask = encoded(np.eye(4, 6))
    known = {"image_id": 5, "category_id": 90, "bbox": [0.5, 0, 3, 2], "score": 0.25}
    return {**known, "segmentation": mask, **changes}


def violations(*results, task="both") -> list[str]:
    return list(coco_violations(list(results), TRUTH, task=task))


# ---- detections ------------------------------------------------------------------------------
def test_sound_results_have_no_violation():
    assert violations(detection(), detection(score=1)) == []
    assert violations() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_id": 1}, "image_id 1 is not in the set"),
        ({"category_id": 1}, "category_id 1 is not in the set; write the set's own ids, not the"),
        ({"score": 1.5}, "score 1.5 is no number from 0 to 1"),
        ({"score": "0.5"}, "score '0.5' is no number"),
        ({"score": float("nan")}, "score nan is no number"),
        ({"bbox": [0, 0, 3]}, "bbox [0, 0, 3] is not [x, y, width, height]"),
        ({"bbox": [0, 0, -3, 1]}, "bbox [0, 0, -3, 1] is not [x, y, width, height]"),
        ({"segmentation": [[0, 0, 1, 0, 1, 1]]}, "segmentation must be {size: [height, width],"),
        ({"segmentation": {"size": [4, 6], "counts": [24]}}, "segmentation must be {size:"),
        (
            {"segmentation": encoded(np.eye(6, 4))},
            "segmentation size [6, 4] is not [height, width] = [4, 6]",
        ),
        (
            {"segmentation": {"size": [4, 6], "counts": "5"}},
            "the counts of the segmentation do not decode to 4 x 6 pixels",
        ),
        ({"segmentation": {"size": [4, 6], "counts": "\n"}}, "do not decode to 4 x 6 pixels"),
    ],
)
def test_each_violation_names_the_result(changes, message):
    (line,) = violations(detection(), detection(**changes))
    assert line.startswith(f"result 1: {message}") or (
        line.startswith("result 1: ") and message in line
    )


def test_only_the_fields_of_the_task_must_be_there():
    boxes = detection()
    del boxes["segmentation"]
    assert violations(boxes, task="bbox") == []
    assert len(violations(boxes, task="segm")) == 1


def test_more_results_than_are_counted_are_told():
    many = [detection() for _ in range(MAX_DETECTIONS + 1)]
    assert violations(*many) == ["image 5: 101 results, at most 100 are counted"]
    assert violations(*many[1:]) == []


def test_all_violations_are_listed_not_only_the_first():
    assert len(violations(detection(score=2, category_id=3), detection(image_id=0))) == 3


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), height=st.integers(1, 90), width=st.integers(1, 90))
def test_run_lengths_are_those_of_the_mask(seed, height, width):
    generator = np.random.default_rng(seed)
    mask = (generator.random((height, width)) < generator.random()).astype(np.uint8)
    runs = run_lengths(encoded(mask)["counts"])
    values = np.repeat(np.arange(len(runs)) % 2, runs)
    assert (values == mask.reshape(-1, order="F")).all()


# ---- the command line ------------------------------------------------------------------------
@pytest.fixture
def files(tmp_path):
    (tmp_path / "truth.json").write_text(json.dumps(TRUTH))
    (tmp_path / "results.json").write_text(json.dumps([detection()]))
    return tmp_path


def check(folder: Path, *args: object) -> int:
    truth = ["--truth", folder / "truth.json"]
    return main([str(a) for a in ("coco", folder / "results.json", *truth, *args)])


def test_a_sound_file_becomes_a_submission_of_one_task(files, capsys):
    assert check(files, "--task", "segm", "--out", files / "send.json") == 0
    assert "0 violations in" in capsys.readouterr().out
    (result,) = json.loads((files / "send.json").read_text())
    assert result.keys() == {"image_id", "category_id", "segmentation", "score"}


def test_violations_are_printed_and_nothing_is_written(files, capsys):
    (files / "results.json").write_text(json.dumps([detection(score=3), detection(image_id=9)]))
    assert check(files, "--task", "segm", "--out", files / "send.json") == 1
    printed = capsys.readouterr().out.splitlines()
    assert [line[:8] for line in printed] == ["result 0", "result 1", "2 violat"]
    assert not (files / "send.json").exists()


def test_wrong_use_is_one_line_and_exit_code_2(files, capsys):
    assert check(files, "--out", files / "send.json") == 2
    assert capsys.readouterr().err.startswith("error: --out needs --task")
    (files / "truth.json").write_text("[]")
    assert check(files) == 2
    assert 'has no "images" and "categories"' in capsys.readouterr().err
    (files / "truth.json").unlink()
    assert check(files) == 2
    assert "truth.json cannot be read" in capsys.readouterr().err


# ---- panoptic --------------------------------------------------------------------------------
@pytest.fixture
def panoptic(tmp_path):
    return write_panoptic(tmp_path)


def check_panoptic(toy, capsys, **changes) -> list[str]:
    toy.content.update(changes)
    truth = toy.json_file.with_name("truth.json")
    if not truth.exists():
        truth.write_text(toy.json_file.read_text())
    toy.save()
    code = main(["panoptic", str(toy.json_file), "--truth", str(truth)])
    lines = capsys.readouterr().out.splitlines()[:-1]
    assert code == bool(lines)
    return lines


def test_panoptic_predictions(panoptic, capsys):
    assert check_panoptic(panoptic, capsys) == []
    one, two = panoptic.content["annotations"]
    assert check_panoptic(panoptic, capsys, annotations=[one]) == [
        "image 2: no entry",
        "toy_panoptic_2.png: in the folder, but not in the json",
    ]
    assert check_panoptic(panoptic, capsys, annotations=[one, two, two]) == ["image 2: 2 entries"]
    strange = {**two, "image_id": "2"}
    assert check_panoptic(panoptic, capsys, annotations=[one, two, strange]) == [
        "image '2' is not in the set"
    ]
    assert check_panoptic(panoptic, capsys, annotations=[one, {"image_id": 2}])[0].startswith(
        "image 2: no file_name, or segments without whole ids"
    )
    assert check_panoptic(panoptic, capsys, annotations={}) == [
        'the json must be an object with a list "annotations" of objects'
    ]


def test_panoptic_pngs(panoptic, capsys):
    ids = panoptic_ids()
    write_ids(panoptic.png(1), ids[:, :-1])
    Image.fromarray(ids.astype(np.uint8)).save(panoptic.png(2))
    lines = check_panoptic(panoptic, capsys)
    assert lines[0] == "toy_panoptic_1.png: 47x32 pixels, expected 48x32"
    assert lines[1].startswith("toy_panoptic_2.png: has mode L, expected RGB")
    write_ids(panoptic.png(1), np.where(ids == IDS[4], 5, ids))
    write_ids(panoptic.png(2), ids)
    panoptic.content["annotations"][1]["segments_info"] = segments_of(ids)
    panoptic.content["annotations"][1]["segments_info"][0]["category_id"] = 0
    assert check_panoptic(panoptic, capsys) == [
        "toy_panoptic_1.png: the PNG holds segment 5, which the json does not list",
        "toy_panoptic_2.png: segment 300 has the unknown category 0",
    ]


def test_panoptic_pngs_lie_in_a_folder_of_the_jsons_name(files, capsys):
    args = ["panoptic", files / "results.json", "--truth", files / "truth.json"]
    assert main([str(a) for a in args]) == 2
    assert "put the PNGs into a folder of the json's name" in capsys.readouterr().err


# ---- cityscapes ------------------------------------------------------------------------------
@pytest.fixture
def city(tmp_path):
    """A sound submission for two frames."""
    names = write_cityscapes(tmp_path / "root", images=2)
    folder = tmp_path / "send"
    folder.mkdir()
    Image.fromarray(np.ones((32, 48), np.uint8)).save(folder / "mask.png")
    (folder / f"{names[0]}_pred.txt").write_text("mask.png 24 0.5\n")
    (folder / f"{names[1]}_pred.txt").write_text("")
    return folder, names


def check_city(folder: Path, capsys, code: int = 1) -> list[str]:
    args = ["cityscapes", folder, "--root", folder.parent / "root", "--split", "val"]
    assert main([str(a) for a in args]) == code
    return capsys.readouterr().out.splitlines()[:-1]


def test_a_sound_folder_passes(city, capsys):
    assert check_city(city[0], capsys, code=0) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("mask.png 11 0.5", "labelID 11 is not one of [24, 25, 26, 27, 28, 31, 32, 33] (not the"),
        ("mask.png 24 high", "confidence high is no number"),
        ("my mask.png 24 0.5", "'my mask.png 24 0.5' is not: mask.png labelID confidence"),
        ("../mask.png 24 0.5", "../mask.png does not lie in"),
        ("/tmp/mask.png 24 0.5", "/tmp/mask.png does not lie in"),
        ("none.png 24 0.5", "none.png does not exist"),
        ("rgb.png 24 0.5", "rgb.png has mode RGB, expected one channel"),
        ("small.png 24 0.5", "small.png is 4x4, expected 48x32"),
        ("broken.png 24 0.5", "broken.png cannot be decoded"),
    ],
)
def test_each_line_is_checked(city, capsys, line, message):
    folder, names = city
    Image.new("RGB", (48, 32)).save(folder / "rgb.png")
    Image.new("L", (4, 4)).save(folder / "small.png")
    (folder / "broken.png").write_bytes(b"no")
    (folder / f"{names[1]}_pred.txt").write_text(f"{line}\n")
    (found,) = check_city(folder, capsys)
    assert found.startswith(f"{names[1]}_pred.txt, line 1: {message}")


def test_each_image_has_just_one_text_and_each_text_an_image(city, capsys):
    folder, names = city
    (folder / f"{names[0]}_again.txt").write_text("mask.png 24 0.5\nmask.png 26 0.5\n")
    (folder / f"{names[1]}_pred.txt").unlink()
    (folder / "other_000000_000000.txt").write_text("")
    assert check_city(folder, capsys) == [
        f"{names[0]}: 2 files match {names[0]}*.txt, expected one",
        f"{names[0]}_again.txt: 2 lines name mask.png, of which the server sees the last",
        f"{names[1]}: 0 files match {names[1]}*.txt, expected one",
        "other_000000_000000.txt: belongs to no image of the split",
    ]


def test_folders_that_are_not_there_are_wrong_use(city, capsys):
    folder, _ = city
    assert main(["cityscapes", str(folder), "--root", str(folder)]) == 2
    assert "holds no <city>/*_leftImg8bit.png; mend --root or --split" in capsys.readouterr().err
    root = str(folder.parent / "root")
    assert main(["cityscapes", "nowhere", "--root", root, "--split", "val"]) == 2
    assert "nowhere is no folder" in capsys.readouterr().err
