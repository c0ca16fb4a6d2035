"""`evaluate` and `segtrain eval`: a split, several processes, what the result says."""

import json
import math

import numpy as np
import pytest
import torch.multiprocessing as mp
from PIL import Image

from segtrain.cli import main
from segtrain.data.datasets import build_layout, named_layout
from segtrain.data.reading import read_image, read_labels
from segtrain.errors import UserError
from segtrain.evaluation.confusion import ConfusionMatrix
from segtrain.evaluation.evaluate import build_inferencer, evaluate, read_ahead
from segtrain.evaluation.trained import choose_device, find_weights, load_trained
from tests.segtrain.toy_runs import NAMES, config_of, write_folder, write_run


@pytest.fixture
def run(tmp_path):
    root = write_folder(tmp_path / "data")
    return write_run(tmp_path / "run", config_of(root))


def report_of(run, **keywords):
    t = load_trained(run)
    return evaluate(t.model, t.layout, "val", t.config, t.device, **keywords)


def test_report_equals_counting_by_hand(run):
    trained = load_trained(run)
    tool, matrix = trained.inferencer(), ConfusionMatrix(3)
    for sample in trained.layout.samples("val"):
        labels = read_labels(trained.layout, sample)
        prediction = tool.labels(read_image(sample.image))
        assert prediction.shape == labels.shape
        matrix.update(prediction, labels)
    report = report_of(run)
    assert report.scores == matrix.scores()
    assert report.images == 3
    assert report.scores.num_void == 3 * 10
    assert np.count_nonzero(matrix.counts.sum(axis=0)) > 1  # more than one class is predicted


def test_the_result_says_what_it_depends_on(run, tmp_path):
    path = tmp_path / "result.json"
    report = report_of(run, json_path=path)
    stored = json.loads(path.read_text())
    assert stored["miou"] == report.scores.miou
    assert (stored["dataset"], stored["split"], stored["images"]) == ("folder", "val", 3)
    assert stored["classes"] == list(NAMES)
    assert stored["inference"] == {
        "mode": "slide",
        "window": 16,
        "stride": 8,
        "pad": "resize",
        "ratios": [1.0],
        "flip": False,
        "base_size": [72, 18],
        "normalisation": "vit",
        "precision": "fp32",
    }
    assert "8-connected" in stored["size_groups"]["definition"]
    assert "2" in stored["boundary"]["definition"]
    groups = [stored["size_groups"][name] for name in ("small", "medium", "large")]
    assert sorted(name for group in groups for name in group["classes"]) == sorted(NAMES)
    assert np.mean([g["miou"] for g in groups]) == pytest.approx(report.scores.miou)
    assert set(stored["iou"]) == set(stored["boundary"]["iou"]) == set(NAMES)
    by_image = report_of(run, statistic="image").as_dict()["size_groups"]["definition"]
    assert "images that show it" in by_image


def test_details_can_be_left_out(run):
    result = report_of(run, detailed=False).as_dict()
    assert result["miou"] == report_of(run).scores.miou
    assert not {"size_groups", "boundary"} & set(result)


def test_table_shows_percent(run):
    report = report_of(run)
    lines = report.table().splitlines()
    assert lines[2].split()[:2] == ["sky", f"{100 * report.scores.iou[0]:.2f}"]
    assert lines[5].split()[:2] == ["mean", f"{100 * report.scores.miou:.2f}"]
    assert f"pixel accuracy {100 * report.scores.pixel_accuracy:.2f}" in lines[6]
    assert "folder val: 3 images" in lines[-1]


def _score(rank: int, world: int, run, folder) -> None:
    import torch.distributed as dist

    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    report = report_of(run, json_path=folder / "result.json")
    (folder / f"{rank}.txt").write_text(repr((report.scores, report.groups, report.boundary)))
    dist.destroy_process_group()


def test_two_processes_count_what_one_counts(run, tmp_path):
    # Forked, because importing torch anew in each takes longer than all other tests.
    mp.start_processes(_score, (2, run, tmp_path), nprocs=2, start_method="fork")
    report = report_of(run)
    expected = repr((report.scores, report.groups, report.boundary))
    assert (tmp_path / "0.txt").read_text() == (tmp_path / "1.txt").read_text() == expected
    assert json.loads((tmp_path / "result.json").read_text())["images"] == 3


def _refuse(rank: int, world: int, run, folder) -> None:
    import torch.distributed as dist

    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    with pytest.raises(UserError, match="1.png has"):
        report_of(run)
    dist.destroy_process_group()


def test_a_bad_file_stops_all_processes(run, tmp_path):
    Image.new("L", (9, 9)).save(tmp_path / "data" / "masks" / "val" / "1.png")
    mp.start_processes(_refuse, (2, run, tmp_path), nprocs=2, start_method="fork")


def test_classes_that_a_mirror_swaps_reach_the_inference(run, tmp_path):
    trained = load_trained(run)
    layout = named_layout("lip", tmp_path)
    tool = build_inferencer(trained.model, trained.config, layout, "cpu")
    assert tool.flip_pairs == layout.flip_pairs == ((14, 15), (16, 17), (18, 19))


def test_progress_counts_images(run):
    seen = []
    report_of(run, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_reading_ahead_keeps_the_order(tmp_path):
    layout = build_layout(config_of(write_folder(tmp_path / "data", count=7)).data)
    samples = layout.samples("val")
    for threads in (1, 3, 20):
        read = list(read_ahead(layout, samples, threads=threads))
        assert [sample for sample, _ in read] == samples
        for sample, (image, labels) in read:
            assert (image == read_image(sample.image)).all()
            assert (labels == read_labels(layout, sample)).all()


def test_image_and_label_of_other_sizes_are_refused(run, tmp_path):
    Image.new("L", (9, 9)).save(tmp_path / "data" / "masks" / "val" / "1.png")
    with pytest.raises(UserError, match=r"1.png has .*see: segtrain data check"):
        report_of(run)


# ---- the command -----------------------------------------------------------------------------
def test_the_command_prints_a_table_or_json(run, tmp_path, capsys):
    assert main(["eval", str(run), "--device", "cpu", "--out", str(tmp_path / "r.json")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("class")
    assert "mIoU by class size" in out
    assert main(["eval", str(run), "--json", "eval.flip=true", "eval.ratios=[0.5, 1.0]"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["inference"]["flip"] is True
    assert result["weights"].endswith("best.safetensors")
    stored = json.loads((tmp_path / "r.json").read_text())
    assert not math.isclose(stored["miou"], result["miou"])


def test_a_configuration_needs_weights(run, tmp_path, capsys):
    config, weights = run / "config.yaml", run / "checkpoints" / "best.safetensors"
    assert main(["eval", str(config), "--weights", str(weights), "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main(["eval", str(config)]) == 2
    assert "has no weights of its own; add --weights FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("weights", "message"),
    [("last", "no last.safetensors in .*train first"), ("x.pth", "no weight file x.pth; name")],
)
def test_missing_weights_are_named(run, weights, message):
    with pytest.raises(UserError, match=message):
        find_weights(run, weights)


def test_the_last_weights_are_taken_where_there_are_no_best(run):
    place = run / "checkpoints"
    (place / "best.safetensors").rename(place / "last.safetensors")
    assert find_weights(run, None) == place / "last.safetensors"


def test_other_mistakes_are_one_line(run, tmp_path, capsys):
    assert main(["eval", str(tmp_path)]) == 2
    assert "is no run, it has no config.yaml" in capsys.readouterr().err
    assert main(["eval", str(run), "--split", "tset", "--device", "cpu"]) == 2
    assert "tset" in capsys.readouterr().err
    with pytest.raises(UserError, match="device 'gpu' cannot be used: .*take --device cpu"):
        choose_device("gpu")
