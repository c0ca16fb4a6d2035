import json

import numpy as np
import pytest
from PIL import Image

from segtrain.cli import main
from segtrain.data.dataset import generator_of
from segtrain.data.datasets import context
from segtrain.data.inspect_commands import _DATASETS
from tests.segtrain.data_samples import DATA, folder_set, needs_data, save

CONFIG = """
data: {dataset: folder, root: %s, crop: [16, 16], base_size: [32, 16]}
model: {name: segmenter, variant: Ti}
optim: {lr: 1.0e-3}
train: {iters: 10, global_batch: 2}
"""


def data(*arguments):
    return main(["data", *map(str, arguments)])


@pytest.fixture
def root(tmp_path):
    return folder_set(tmp_path / "set", [[[0, 1, 2]], [[0, 0, 255]]])


def folder(root):
    return ("--dataset", "folder", "--root", root)


def test_check_of_a_sound_set(root, capsys):
    assert data("check", *folder(root)) == 0
    assert capsys.readouterr().out.splitlines() == ["train: 2 images, fine", "val: 2 images, fine"]


def test_check_proposes_lines_and_exits_with_2(root, capsys):
    assert data("check", *folder(root), "--split", "val", "data.folder.ignore=[]") == 2
    out = capsys.readouterr().out
    assert out.startswith(
        "val: 2 images, to mend:\n  error: unknown value 255 in 1 of 2 label maps"
    )
    assert "  looks like: 255 is usual for pixels without a label" in out
    assert out.rstrip().endswith("    data:\n      folder:\n        ignore: [255]")


def test_check_of_a_configuration_as_json(root, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG % root)
    (root / "masks/train/1.png").unlink()
    assert data("check", path, "--json") == 2
    report = json.loads(capsys.readouterr().out)
    assert [split["split"] for split in report["splits"]] == ["train", "val"]
    (error,) = report["splits"][0]["errors"]
    assert error["kind"] == "unreadable"
    assert error["files"] == [str(root / "masks/train/1.png")]


def test_synthetic_scenes_are_sound(tmp_path, capsys):
    out = tmp_path / "scenes"
    assert data("synth", "--out", out, "--format", "folder", "--num", 4, "--size", 64) == 0
    assert data("check", *folder(out)) == 0
    assert "train: 3 images, fine" in capsys.readouterr().out


def test_headers_only(root, capsys):
    save(root / "masks/train/0.png", [[77, 77, 77]])
    assert data("check", *folder(root), "--headers") == 0


def test_stats(root, capsys):
    assert data("stats", *folder(root), "--split", "train") == 0
    out = capsys.readouterr().out
    assert out.startswith("train: 2 images, 16.7% of the pixels ignored\n  sizes: 3x1 (2)\n")
    assert data("stats", *folder(root), "--json") == 0
    train = json.loads(capsys.readouterr().out)["splits"][0]
    assert [c["pixels"] for c in train["classes"]] == [3, 1, 1]
    assert [c["images"] for c in train["classes"]] == [2, 1, 1]
    assert train["classes"][0]["share"] == pytest.approx(0.6)
    # images of 0 and of 40
    assert train["mean"] == pytest.approx([20 / 255] * 3)
    assert train["std"] == pytest.approx([20 / 255] * 3)


@needs_data
def test_show_writes_pictures(tmp_path, capsys):
    source = ("--dataset", "camvid", "--root", DATA / "camvid", "--split", "val")
    assert data("show", *source, "--num", 2, "--augment", "--out", tmp_path / "out") == 0
    files = sorted((tmp_path / "out/val").iterdir())
    assert "wrote 2 pictures of val" in capsys.readouterr().out
    assert len(files) == 2
    picture = np.asarray(Image.open(files[0]))
    original = np.asarray(Image.open(DATA / "camvid/val" / f"{files[0].stem}.jpg"))
    assert (picture[:360, :480] == original).all()
    assert picture.shape[1] > 480 * 3


def test_prepare_cityscapes(tmp_path, capsys):
    source = save(tmp_path / "gtFine/val/a/a_gtFine_labelIds.png", [[7, 8, 0, 33]])
    assert data("prepare", "cityscapes", "--root", tmp_path) == 0
    assert "wrote 1 label maps" in capsys.readouterr().out
    target = source.with_name("a_gtFine_labelTrainIds.png")
    assert np.asarray(Image.open(target)).tolist() == [[0, 1, 255, 18]]
    assert data("prepare", "cityscapes", "--root", tmp_path) == 0
    assert "wrote 0 label maps" in capsys.readouterr().out
    save(source, [[99]])
    assert data("prepare", "cityscapes", "--root", tmp_path) == 2
    assert "a_gtFine_labelIds.png: unknown value 99" in capsys.readouterr().err


def raw_context(tmp_path, *, names=None):
    savemat = pytest.importorskip("scipy.io").savemat
    raw, root = tmp_path / "raw", tmp_path / "VOC2010"
    (raw / "trainval").mkdir(parents=True)
    names = names or {k: context.RAW_NAMES.get(k, f"other{k}") for k in range(1, 460)}
    (raw / "labels.txt").write_text("".join(f"{k}: {name}\n" for k, name in names.items()))
    for name, first in (("x", 2), ("y", 458)):
        savemat(raw / f"trainval/{name}.mat", {"LabelMap": np.array([[first, 1, 9]], np.uint16)})
    (root / "ImageSets/Main").mkdir(parents=True)
    (root / "ImageSets/Main/train.txt").write_text("z\ny\n")
    (root / "ImageSets/Main/val.txt").write_text("x\n")
    return root, raw


def test_prepare_context(tmp_path, capsys):
    root, raw = raw_context(tmp_path)
    assert data("prepare", "context", "--root", root, "--raw", raw) == 0
    masks = root / "SegmentationClassContext"
    assert np.asarray(Image.open(masks / "x.png")).tolist() == [[1, 0, 2]]
    assert np.asarray(Image.open(masks / "y.png")).tolist() == [[59, 0, 2]]
    lists = root / "ImageSets/SegmentationContext"
    assert [(lists / f"{s}.txt").read_text() for s in ("train", "val")] == ["y\n", "x\n"]
    for name in ("x", "y"):
        save(root / f"JPEGImages/{name}.jpg", np.zeros((1, 3, 3)))
    assert data("check", "--dataset", "context59", "--root", root) == 0


def test_prepare_context_checks_the_numbering(tmp_path, capsys):
    names = {k: context.RAW_NAMES.get(k, "other") for k in range(1, 460)} | {9: "sack"}
    root, raw = raw_context(tmp_path, names=names)
    assert data("prepare", "context", "--root", root, "--raw", raw) == 2
    assert "numbers the labels in another way: 9 is 'sack' instead of 'bag'" in (
        capsys.readouterr().err
    )


def test_data_sets_of_the_help_are_those_of_the_program():
    from segtrain.data.datasets import DATASETS

    assert set(_DATASETS) == {*DATASETS, "folder"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["check"], "expected one configuration, got 0"),
        (["check", "--dataset", "voc"], "expected a configuration, or both --dataset and --root"),
        (["check", "gone.yaml"], "gone.yaml"),
        (["stats", "--dataset", "camvid", "--root", "gone"], "no folder gone"),
        (["prepare", "context", "--root", "x"], "needs --raw DIR"),
        (["prepare", "cityscapes", "--root", "gone"], "no *_labelIds.png below gone/gtFine"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(arguments, text, capsys):
    assert data(*arguments) == 2
    err = capsys.readouterr().err
    assert text in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["check", "stats", "show", "prepare"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        data(command, "--help")
    assert stop.value.code == 0
    assert "examples:" in capsys.readouterr().out


@pytest.mark.parametrize("seed", [0, 5])
def test_show_draws_the_crops_of_training(root, tmp_path, monkeypatch, seed):
    from segtrain.data import show

    drawn = []

    def recorded(*numbers):
        drawn.append(numbers)
        return generator_of(*numbers)

    monkeypatch.setattr(show, "generator_of", recorded)
    options = ("--num", 1, "--augment", "--out", tmp_path / "out", f"train.seed={seed}")
    assert data("show", *folder(root), *options) == 0
    assert drawn == [(seed, 0, 0), (seed, 1, 0)]
