"""Counts of every image: what is written, and what is refused when read."""

import io
import json
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch.multiprocessing as mp

from segtrain.cli import main
from segtrain.data.reading import read_image, read_labels
from segtrain.errors import UserError
from segtrain.evaluation import per_image
from segtrain.evaluation.confusion import ConfusionMatrix
from segtrain.evaluation.evaluate import evaluate
from segtrain.evaluation.per_image import Recorder, read_counts, write_counts
from segtrain.evaluation.size_groups import ClassSizes
from segtrain.evaluation.trained import load_trained
from tests.segtrain.toy_runs import NAMES, config_of, write_folder, write_run

ABOUT = {"dataset": "folder", "split": "val", "classes": list(NAMES), "inference": {"flip": False}}


@pytest.fixture
def run(tmp_path):
    root = write_folder(tmp_path / "data", count=5)
    return write_run(tmp_path / "run", config_of(root))


def counts_of(run, path):
    t = load_trained(run)
    report = evaluate(t.model, t.layout, "val", t.config, t.device, counts_path=path)
    return report, read_counts(path)


def test_every_image_is_counted_as_by_hand(run, tmp_path):
    report, counts = counts_of(run, tmp_path / "c.npz")
    trained = load_trained(run)
    tool = trained.inferencer()
    assert counts.images == tuple(s.name for s in trained.layout.samples("val"))
    for number, sample in enumerate(trained.layout.samples("val")):
        matrix = ConfusionMatrix(3)
        matrix.update(tool.labels(read_image(sample.image)), read_labels(trained.layout, sample))
        right, truth = np.diagonal(matrix.counts), matrix.counts.sum(axis=1)
        assert counts.right()[number].tolist() == right.tolist()
        assert counts.truth()[number].tolist() == truth.tolist()
        union = truth + matrix.counts.sum(axis=0) - right
        assert counts.union()[number].tolist() == union.tolist()
        assert counts.void[number] == matrix.num_void == 10
    assert (counts.cells[3] > 0).all()
    iou = counts.right().sum(axis=0) / counts.union().sum(axis=0)
    assert iou.tolist() == list(report.scores.iou)
    assert counts.about == {
        "version": 1,
        **{key: report.as_dict()[key] for key in ("dataset", "split", "classes", "inference")},
    }
    groups = [(group.name, group.classes) for group in report.groups]
    ranked = np.argsort(counts.class_sizes().statistic("component"), kind="stable")
    assert [classes for _, classes in groups] == [(int(k),) for k in ranked]


def _score(rank: int, world: int, run, folder) -> None:
    import torch.distributed as dist

    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    t = load_trained(run)
    evaluate(t.model, t.layout, "val", t.config, t.device, counts_path=folder / f"rank{rank}.npz")
    dist.destroy_process_group()


def test_two_processes_write_what_one_writes(run, tmp_path):
    mp.start_processes(_score, (2, run, tmp_path), nprocs=2, start_method="fork")
    assert not (tmp_path / "rank1.npz").exists()
    counts_of(run, tmp_path / "one.npz")
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "rank0.npz")
    assert set(one) == set(two) == {"about", "images", "cells", "void", "sizes"}
    for key in one:
        assert np.array_equal(one[key], two[key]), key


def test_training_keeps_no_counts(run, tmp_path):
    t = load_trained(run)
    path = tmp_path / "c.npz"
    evaluate(t.model, t.layout, "val", t.config, t.device, detailed=False, counts_path=path)
    assert not path.exists()


# ---- where the command writes ----------------------------------------------------------------
def test_counts_lie_in_the_run_or_beside_the_result(run, tmp_path, capsys):
    assert main(["eval", str(run), "--device", "cpu"]) == 0
    place = run / "per_image_val.npz"
    assert capsys.readouterr().out.splitlines()[-1] == f"counts of every image: {place}"
    first = read_counts(place)
    place.unlink()
    result = tmp_path / "r.json"
    assert main(["eval", str(run), "--device", "cpu", "--json", "--out", str(result)]) == 0
    assert json.loads(capsys.readouterr().out)["image_counts"] == str(tmp_path / "r.npz")
    assert not place.exists()
    assert np.array_equal(read_counts(tmp_path / "r.npz").cells, first.cells)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_configuration_without_a_result_file_writes_none(run, capsys):
    config, weights = run / "config.yaml", run / "checkpoints" / "best.safetensors"
    assert main(["eval", str(config), "--weights", str(weights), "--device", "cpu"]) == 0
    assert "counts" not in capsys.readouterr().out
    assert not list(run.rglob("*.npz"))


@pytest.mark.parametrize(
    ("out", "text"),
    [("r.npz", "give --out another ending than .npz"), ("no/r.json", "no folder .*no for --out")],
)
def test_a_wrong_place_is_refused_before_the_work(run, tmp_path, capsys, out, text):
    assert main(["eval", str(run), "--device", "cpu", "--out", str(tmp_path / out)]) == 2
    error = capsys.readouterr().err
    assert re.search(text, error)
    assert not list(tmp_path.rglob("*.npz"))


def test_a_run_that_may_not_be_changed_is_scored_all_the_same(run, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert main(["eval", str(run), "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["image_counts"] is None
    assert not list(run.rglob("*.npz"))


# ---- reading ---------------------------------------------------------------------------------
@pytest.fixture
def written(tmp_path):
    """A small file of two images."""
    recorder = Recorder()
    for name, labels in (("a", [0, 1, 255]), ("b ü", [2, 2, 2])):
        matrix = ConfusionMatrix(3)
        matrix.update(np.array([0, 0, 1]), np.array(labels))
        recorder.add(name, matrix)
    path = tmp_path / "c.npz"
    write_counts(path, recorder.counts(ABOUT, ClassSizes(3)))
    return path


def test_what_was_written_is_read(written):
    counts = read_counts(written)
    assert counts.images == ("a", "b ü")
    assert counts.void.tolist() == [1, 0]
    assert counts.cells.T.tolist() == [[0, 0, 0, 1], [0, 1, 0, 1], [1, 2, 0, 2], [1, 2, 1, 1]]
    assert counts.classes == NAMES


def changed(path, **arrays) -> None:
    stored = {**np.load(path), **arrays}
    np.savez(path, **{key: value for key, value in stored.items() if value is not None})


def about(**fields) -> np.ndarray:
    return np.array(json.dumps({"version": 1, **ABOUT, **fields}))


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"void": None}, "void"),
        ({"about": np.array("[1]")}, "'about' is no mapping"),
        ({"about": np.array("{")}, "Expecting property name"),
        ({"about": about(classes=None)}, "'about' has no classes"),
        ({"about": about(classes=["a", "b", ["c"]])}, "classes that are no text"),
        ({"about": np.array("[" * 100_000)}, "recursion"),
        ({"about": about(version=2)}, "version 2, this program reads 1"),
        ({"about": about(classes=["sky"])}, "'sizes' is int64"),
        ({"images": np.array([], "<U1")}, "'images' is no list of names"),
        ({"images": np.array([1, 2])}, "'images' is no list of names"),
        ({"void": np.array([0])}, "'void' is int64"),
        ({"void": np.array([0.5, 1.0])}, "'void' is float64"),
        ({"void": np.array([0, -1])}, "or negative"),
        ({"cells": np.array(7)}, "'cells' is int64"),
        ({"cells": np.zeros((3, 2), np.int64)}, "'cells' is int64"),
        ({"cells": np.array([[2], [0], [0], [1]])}, "an image or a class that is not there"),
        ({"cells": np.array([[0], [3], [0], [1]])}, "an image or a class that is not there"),
        ({"cells": np.array([[0], [0], [3], [1]])}, "an image or a class that is not there"),
    ],
)
def test_what_does_not_fit_is_refused(written, arrays, reason):
    changed(written, **arrays)
    with pytest.raises(UserError, match=r"c.npz holds no counts of images .*segtrain eval") as e:
        read_counts(written)
    assert reason in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"{}", b"\x93NUMPY" * 9])
def test_other_files_are_refused(written, content):
    written.write_bytes(content)
    with pytest.raises(UserError, match="holds no counts of images"):
        read_counts(written)


def test_cut_off_files_are_refused(written):
    content = written.read_bytes()
    for length in range(0, len(content), 97):
        written.write_bytes(content[:length])
        with pytest.raises(UserError, match="holds no counts of images"):
            read_counts(written)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no file .*x.npz; write it by: segtrain eval"):
        read_counts(tmp_path / "x.npz")


class _Code:
    def __reduce__(self):
        return open, ("executed", "w")


def test_pickles_are_not_executed(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(_Code()))  # the trap works
    (tmp_path / "executed").unlink()
    evil = np.empty(1, object)
    evil[0] = _Code()
    changed(written, images=evil)
    with pytest.raises(UserError, match="pickle"):
        read_counts(written)
    written.write_bytes(pickle.dumps(_Code()))
    with pytest.raises(UserError, match="holds no counts"):
        read_counts(written)
    assert not (tmp_path / "executed").exists()


def test_a_bomb_is_not_unpacked(written, monkeypatch):
    monkeypatch.setattr(per_image, "_MOST_BYTES", 10_000)
    assert len(read_counts(written).images) == 2
    with zipfile.ZipFile(written, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("more.npy", bytes(20_000))
    with pytest.raises(UserError, match="unpacks to more than"):
        read_counts(written)


def test_a_header_that_promises_too_much_is_refused(written):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<i8", "fortran_order": False, "shape": (1 << 45,)}
    )
    stored = dict(np.load(written))
    del stored["void"]
    np.savez(written, **stored)
    with zipfile.ZipFile(written, "a") as archive:
        archive.writestr("void.npy", header.getvalue())
    with pytest.raises(UserError, match="holds no counts"):
        read_counts(written)


def test_an_interruption_leaves_the_old_file(written, monkeypatch):
    before = written.read_bytes()

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", stop)
    with pytest.raises(KeyboardInterrupt):
        write_counts(written, read_counts(written))
    assert [path.name for path in written.parent.iterdir()] == ["c.npz"]
    assert written.read_bytes() == before
