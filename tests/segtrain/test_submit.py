"""`segtrain submit`: what the server of Cityscapes takes, and the same mIoU by its own code."""

import io
import json
import os
import re
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from segtrain.cli import main
from segtrain.data.datasets import named_layout
from segtrain.data.datasets.cityscapes import LABEL_IDS, label_ids_encoding
from segtrain.data.reading import read_labels
from segtrain.errors import UserError
from segtrain.evaluation import cityscapes_official, submission
from segtrain.evaluation.confusion import ConfusionMatrix
from segtrain.evaluation.submission import submit_cityscapes
from segtrain.evaluation.trained import load_trained
from segtrain.submit import image_sizes, key_of, to_label_ids, violations
from tests.segtrain.toy_runs import config_of, write_cityscapes, write_folder, write_run
from tests.shared_data import SHARED, needs_shared

KEYS = ("toy_000000_000019", "toy_000001_000019")
SIZES = dict.fromkeys(KEYS, (32, 64))


@pytest.fixture
def root(tmp_path):
    return write_cityscapes(tmp_path / "cityscapes")


@pytest.fixture
def run(root, tmp_path):
    return write_run(
        tmp_path / "run", config_of(root, dataset="cityscapes"), num_classes=19, seed=0
    )


@pytest.fixture
def results(tmp_path):
    """A folder that the server would take."""
    folder = tmp_path / "results"
    folder.mkdir()
    rng = np.random.default_rng(2)
    for key in KEYS:
        labels = rng.choice(LABEL_IDS, (32, 64)).astype(np.uint8)
        Image.fromarray(labels).save(folder / f"{key}_pred.png")
    return folder


# ---- names and values ------------------------------------------------------------------------
def test_train_ids_become_label_ids_and_back():
    labels = np.arange(19, dtype=np.uint8)[None]
    written = to_label_ids(labels)
    assert written.tolist() == [list(LABEL_IDS)]
    assert (label_ids_encoding().decode(written) == labels).all()
    with pytest.raises(UserError, match=r"expected train ids 0\.\.18, got 255; predict with"):
        to_label_ids(np.array([[255]], np.uint8))


def test_names_are_the_servers(tmp_path):
    assert key_of(tmp_path / "bad_homburg_000001_000019_leftImg8bit.png") == (
        "bad_homburg_000001_000019"
    )
    for name in ("a.png", "ulm_000001_leftImg8bit.png", "ulm_x_000019_leftImg8bit.png"):
        with pytest.raises(UserError, match="is not named <city>_<sequence>_<frame>_leftImg8bit"):
            key_of(tmp_path / name)


# ---- the validator ---------------------------------------------------------------------------
def test_a_right_folder_and_archive_have_no_violation(results, tmp_path):
    assert list(violations(results, SIZES)) == []
    archive = tmp_path / "results.zip"
    with zipfile.ZipFile(archive, "w") as target:
        for path in results.iterdir():
            target.write(path, f"any/folder/{path.name}")
    assert list(violations(archive, SIZES)) == []


def spoil(folder, kind: str) -> None:
    path = folder / f"{KEYS[0]}_pred.png"
    labels = np.asarray(Image.open(path)).copy()
    if kind == "train ids":
        Image.fromarray(label_ids_encoding().decode(labels)).save(path)
    elif kind == "255":
        labels[3, 4] = 255
        Image.fromarray(labels).save(path)
    elif kind == "size":
        Image.fromarray(labels[:, :32]).save(path)
    elif kind == "missing":
        path.unlink()
    elif kind == "twice":
        Image.fromarray(labels).save(folder / f"{KEYS[0]}_other.png")
    elif kind == "rgb":
        Image.fromarray(np.stack([labels] * 3, axis=2)).save(path)
    elif kind == "jpeg":
        Image.fromarray(labels).save(path, format="JPEG")
    elif kind == "damaged":
        path.write_bytes(path.read_bytes()[:60])
    elif kind == "foreign":
        Image.fromarray(labels).save(folder / "ulm_000000_000019_pred.png")
    elif kind == "text":
        (folder / "notes.txt").write_text("x")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("train ids", "are no evaluated classes; these look like train ids"),
        ("255", r"values \[255\] are no label ids, expected 0..33"),
        ("size", "32x32 pixels, expected 64x32"),
        ("missing", "toy_000000_000019: no file starts with this name"),
        ("twice", "toy_000000_000019: 2 files start with this name"),
        ("rgb", "expected an 8-bit PNG of one channel, got PNG of mode RGB"),
        ("jpeg", "got JPEG of mode L"),
        ("damaged", "cannot be read"),
        ("foreign", "ulm_000000_000019_pred.png: belongs to no image of the split"),
        ("text", "notes.txt: only .png files belong"),
    ],
)
def test_every_rule_is_checked(results, kind, message):
    spoil(results, kind)
    (found,) = violations(results, SIZES)
    assert re.search(message, found)


def test_every_violation_is_listed(results):
    for kind in ("twice", "255", "foreign", "text"):
        spoil(results, kind)
    assert len(list(violations(results, SIZES))) == 4


def test_results_must_be_a_folder_or_an_archive(tmp_path):
    (tmp_path / "x.zip").write_text("no archive")
    for name in ("x.zip", "absent"):
        with pytest.raises(UserError, match="is neither a folder nor a zip archive"):
            list(violations(tmp_path / name, SIZES))


# ---- the whole way ---------------------------------------------------------------------------
def test_what_is_written_is_valid_and_scores_the_same(run, root, tmp_path):
    trained = load_trained(run)
    found = submit_cityscapes(trained, "val", tmp_path / "sent")
    assert found.violations == ()
    names = sorted(path.name for path in (tmp_path / "sent").iterdir())
    assert names == [f"{key}_labelIds.png" for key in KEYS]
    with zipfile.ZipFile(found.archive) as archive:
        assert sorted(archive.namelist()) == names
        content = io.BytesIO(archive.read(names[0]))
    assert set(np.unique(Image.open(content))) <= set(LABEL_IDS)
    matrix, tool = ConfusionMatrix(19), trained.inferencer()
    for sample in trained.layout.samples("val"):
        labels = tool.labels(np.asarray(Image.open(sample.image)))
        matrix.update(labels, read_labels(trained.layout, sample))
    assert np.count_nonzero(matrix.counts.sum(axis=0)) > 1  # more than one class is predicted
    scores = matrix.scores()
    assert found.miou == scores.miou
    assert found.official["averageScoreClasses"] == pytest.approx(scores.miou, abs=1e-12)
    official = [found.official["classScores"][name] for name in trained.layout.classes.names]
    assert np.allclose(official, scores.iou, rtol=0, atol=1e-12, equal_nan=True)
    assert not np.isnan(found.official["averageScoreInstClasses"])


def test_the_same_pictures_give_the_same_archive(run, tmp_path):
    trained = load_trained(run)
    one, two = (submit_cityscapes(trained, "val", tmp_path / n).archive for n in "ab")
    assert one.read_bytes() == two.read_bytes()
    with zipfile.ZipFile(one) as archive:  # no time of day, which two quick runs share
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_without_ground_truth_there_is_an_archive_and_no_score(run, root, tmp_path):
    write_cityscapes(root, split="test", truth=False)
    found = submit_cityscapes(load_trained(run), "test", tmp_path / "sent")
    assert found.archive.is_file()
    assert (found.miou, found.official) == (None, None)


def test_ground_truth_without_a_class_gives_no_score(run, root, tmp_path):
    for path in root.glob("gtFine/val/toy/*_labelIds.png"):
        Image.new("L", (64, 32), 3).save(path)
    assert submit_cityscapes(load_trained(run), "val", tmp_path / "sent").official is None


def test_a_disagreement_with_the_official_score_is_an_error(run, tmp_path, monkeypatch):
    monkeypatch.setattr(submission, "official_scores", lambda *_: {"averageScoreClasses": 0.5})
    with pytest.raises(RuntimeError, match="cityscapesScripts finds mIoU 0.5, segtrain"):
        submit_cityscapes(load_trained(run), "val", tmp_path / "sent")


def test_another_data_set_and_a_used_folder_are_refused(run, tmp_path):
    other = write_run(tmp_path / "other", config_of(write_folder(tmp_path / "data")))
    with pytest.raises(UserError, match="the model was trained on folder; add data.dataset="):
        submit_cityscapes(load_trained(other), "val", tmp_path / "sent")
    with pytest.raises(UserError, match="is not empty; name a new folder"):
        submit_cityscapes(load_trained(run), "val", run)


def test_commands(run, root, results, tmp_path, capsys):
    sent = tmp_path / "sent"
    done = main(["submit", "cityscapes", str(run), "--split", "val", "--out", str(sent), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert done == 0
    assert result["miou"] == pytest.approx(result["official_miou"], abs=1e-12)
    assert result["evaluator"].startswith("cityscapesScripts 2.")
    check = ["submit", "check", f"{sent}.zip", "--root", str(root), "--split", "val"]
    assert main(check) == 0
    assert capsys.readouterr().out == f"{sent}.zip: valid, 2 images in val\n"
    spoil(results, "255")
    spoil(results, "text")
    check[2] = str(results)
    assert main(check) == 2
    out = capsys.readouterr().out
    assert "2 violations, 2 images in val" in out
    assert main([*check, "--json"]) == 2
    assert len(json.loads(capsys.readouterr().out)["violations"]) == 2


# ---- the official code -----------------------------------------------------------------------
def pairs_of(root, results):
    truths = sorted(root.glob("gtFine/val/toy/*_labelIds.png"))
    return dict(zip(truths, sorted(results.iterdir()), strict=True))


@needs_shared
def test_scores_of_a_real_frame_equal_the_official_ones(tmp_path):
    layout = named_layout("cityscapes", SHARED / "data" / "panoptic" / "cityscapes_sample")
    (sample,) = layout.samples("val")
    labels = read_labels(layout, sample)
    rng = np.random.default_rng(0)
    wrong = (rng.random(labels.shape) < 0.2) | (labels == 255)
    prediction = np.where(wrong, rng.integers(0, 19, labels.shape), labels).astype(np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(to_label_ids(prediction)).save(path)
    matrix = ConfusionMatrix(19)
    matrix.update(prediction, labels)
    scores, official = matrix.scores(), cityscapes_official.pixel_scores({sample.label: path})
    assert official["averageScoreClasses"] == pytest.approx(scores.miou, abs=1e-12)
    found = [official["classScores"][name] for name in layout.classes.names]
    assert np.allclose(found, scores.iou, rtol=0, atol=1e-12, equal_nan=True)
    assert scores.num_void == np.count_nonzero(labels == 255) > 0


def test_official_scores_leave_numpy_modules_and_folder_alone(root, results, monkeypatch):
    folder = results.parent / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    before = set(vars(np))
    cityscapes_official.pixel_scores(pairs_of(root, results))
    assert set(vars(np)) == before
    assert os.listdir(folder) == []
    assert "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling" not in sys.modules


def test_without_instance_ids_there_is_no_iiou(root, results):
    for path in root.glob("gtFine/val/toy/*_instanceIds.png"):
        path.unlink()
    found = cityscapes_official.pixel_scores(pairs_of(root, results))
    assert found["averageScoreClasses"] > 0
    assert not found["averageScoreInstClasses"] > 0


def test_the_stand_in_is_still_needed(root, results):
    module = cityscapes_official._private_copy()
    module.np = np
    module.args.JSONOutput, module.args.quiet = False, True
    pairs = pairs_of(root, results)
    # Where this fails, upstream runs on numpy 2.4 and the stand-in can go.
    with pytest.raises(AttributeError, match="in1d"):
        module.evaluateImgLists([str(p) for p in pairs.values()], [*map(str, pairs)], module.args)


def test_what_the_script_refuses_is_said(root, results):
    spoil(results, "size")
    with pytest.raises(UserError, match=r"^cityscapesScripts: Image widths of .* are not equal"):
        cityscapes_official.pixel_scores(pairs_of(root, results))


def test_sizes_come_from_the_images(root):
    assert image_sizes(named_layout("cityscapes", root).samples("val")) == SIZES
