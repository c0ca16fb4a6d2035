"""Arithmetic of the benchmarks of the semantic trainer; the measuring is left to them."""

import pytest

from benchmarks import camvid, fpt_seg


def test_every_small_configuration_is_compared():
    names = camvid.configurations()
    assert {"fcn", "fpt", "ufp", "mlp", "segmenter", "sr_ghp", "unept"} <= set(names)
    assert all(path.name.endswith("_small.yaml") for path in names.values())
    assert len({path.stem for path in names.values()}) == len(names)


def test_scores_are_means_over_seeds_beside_the_baseline():
    runs = {
        "fcn": [{"miou": {"val": v, "test": v - 10}, "memory_mb": 5} for v in (40.0, 44.0)],
        "fpt": [{"miou": {"val": v, "test": v - 8}, "memory_mb": 7} for v in (50.0, 55.0)],
    }
    cost = {"parameters": 1.0, "macs": 2.0, "images": 3.0, "large": 0.5, "step": 4.0}
    costs = dict.fromkeys(runs, cost)
    rows = {(row.name, row.metric): row for row in camvid.rows_of(runs, costs)}
    row = rows["fpt", "mIoU, val"]
    assert (row.value, row.baseline, row.baseline_value) == (52.5, "fcn", 42.0)
    assert row.note == "+-3.54 over 2 seeds"
    assert rows["fcn", "mIoU, test"].value == 32.0
    assert rows["fcn", "mIoU, test"].baseline == ""
    assert rows["fpt", "memory of the training process"].value == 7
    assert rows["fpt", "images per second, 1024x2048"].value == 0.5


def test_overrides_of_a_shorter_run(tmp_path):
    options = camvid.parse(["--iters", "50", "--root", str(tmp_path)])
    assert camvid.overrides(options) == [
        f"data.root={tmp_path}",
        "train.iters=50",
        "train.eval_every=5",
        "train.checkpoint_every=5",
        "schedule.warmup_iters=2",
    ]
    assert camvid.overrides(camvid.parse(["--root", str(tmp_path)])) == [f"data.root={tmp_path}"]


def test_the_root_is_found_in_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SEGTRAIN_DATASETS", str(tmp_path))
    assert camvid.parse([]).root == tmp_path / "camvid"


def test_forecast_is_a_line_over_pixels():
    memory = {side: 100 + 0.01 * side**2 for side in (100, 200, 300)}
    found, distance = fpt_seg.forecast(memory, 1000)
    assert found == pytest.approx(10_100)
    assert distance == pytest.approx(0, abs=1e-9)
    assert fpt_seg.forecast({100: 1.0, 200: 2.0}, 1000) is None


def test_a_crop_that_fails_does_not_count():
    results = {
        side: {"memory": 100 + 0.01 * side**2, "seconds": 1.0, "fixed": 1024.0}
        for side in (129, 257, 385)
    }
    results[641] = {"failed": "out of memory"}
    *_, last = fpt_seg.rows_of("UFP + FPT, fp32", results)
    assert last.value == pytest.approx((100 + 0.01 * 969**2 + 1024) / 1024)
    assert (last.target, last.met) == ("value <= 24", True)
    few = {129: results[129], 641: results[641]}
    *_, last = fpt_seg.rows_of("UFP + FPT, fp32", few)
    assert (last.value, last.met, last.note) == (None, False, "fewer than three crops fit")
