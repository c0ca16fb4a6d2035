"""The output folder of a run: what its start writes, and what is read back."""

import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog
from detectron2.utils import comm

from d2ctx import UserError, runs

from .toy_coco import toy_config, write_toy

pytestmark = pytest.mark.usefixtures("isolated")


@pytest.fixture
def cfg(tmp_path):
    toy = write_toy(tmp_path / "data", "toy_val", images=2)
    cfg = toy_config(train=[], test=[toy], output=tmp_path / "parent" / "run")
    cfg.SEED = 3
    return cfg


def draws() -> tuple[float, float, float]:
    """One number of each generator that training draws from."""
    return random.random(), float(np.random.rand()), torch.rand(()).item()


# ---- starting --------------------------------------------------------------------------------
def test_start_makes_the_folder_with_configuration_and_environment(cfg):
    runs.start_run(cfg)
    folder = Path(cfg.OUTPUT_DIR)
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "environment.txt", "log.txt"}
    assert (folder / "config.yaml").read_text() == cfg.dump()
    assert torch.__version__ in (folder / "environment.txt").read_text()


@pytest.mark.parametrize("name", ["d2ctx.trainer", "detectron2.engine", "fvcore.common"])
def test_messages_go_to_terminal_and_log(cfg, capsys, name):
    runs.start_run(cfg)
    logging.getLogger(name).info("reached %d", 7)
    assert "reached 7" in (Path(cfg.OUTPUT_DIR) / "log.txt").read_text()
    assert "reached 7" in capsys.readouterr().out


def test_the_terminal_is_spared_the_configuration_and_the_environment(cfg, capsys):
    runs.start_run(cfg)
    assert capsys.readouterr().out == ""


def test_a_seed_repeats_all_random_numbers(cfg):
    runs.start_run(cfg)
    first = draws()
    runs.start_run(cfg)
    assert draws() == first


def test_without_a_seed_random_numbers_differ(cfg):
    cfg.SEED = -1
    runs.start_run(cfg)
    first = draws()
    runs.start_run(cfg)
    assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_another_process_writes_only_its_log_and_draws_other_numbers(cfg, monkeypatch):
    runs.start_run(cfg)
    first = draws()
    cfg.OUTPUT_DIR += "_of_rank_1"
    monkeypatch.setattr(comm, "get_rank", lambda: 1)
    runs.start_run(cfg)
    assert [path.name for path in Path(cfg.OUTPUT_DIR).iterdir()] == ["log.txt.rank1"]
    assert all(a != b for a, b in zip(draws(), first, strict=True))


# ---- reading ---------------------------------------------------------------------------------
def test_configuration_is_read_back_with_its_data_sets(cfg):
    runs.start_run(cfg)
    DatasetCatalog.remove("toy_val")
    read = runs.run_config(Path(cfg.OUTPUT_DIR))
    assert yaml.safe_load(read.dump()) == yaml.safe_load(cfg.dump())
    assert len(DatasetCatalog.get("toy_val")) == 2


def test_predictions_are_grouped_by_image_in_order(tmp_path):
    found = [{"image_id": i, "score": score} for i, score in [(7, 0.9), (3, 0.8), (7, 0.1)]]
    folder = tmp_path / "inference" / "toy_val"
    folder.mkdir(parents=True)
    (folder / "coco_instances_results.json").write_text(json.dumps(found))
    assert runs.run_predictions(tmp_path, "toy_val") == {7: [found[0], found[2]], 3: [found[1]]}


def test_a_record_cut_off_by_a_crash_is_skipped(tmp_path):
    (tmp_path / "metrics.json").write_text('{"iteration": 19}\n{"iteration": 39}\n{"iterat')
    assert list(runs.run_metrics(tmp_path)) == [{"iteration": 19}, {"iteration": 39}]


@pytest.mark.parametrize(
    ("read", "missing"),
    [
        (runs.run_config, "config.yaml"),
        (runs.run_results, "results.json"),
        (lambda run: runs.run_predictions(run, "toy_val"), "toy_val/coco_instances_results.json"),
        (lambda run: list(runs.run_metrics(run)), "metrics.json"),
    ],
    ids=["config", "results", "predictions", "metrics"],
)
def test_what_a_folder_lacks_is_named(tmp_path, read, missing):
    with pytest.raises(UserError, match=rf"{missing} does not exist; train first, or mend"):
        read(tmp_path)
