"""The commands on real files: synthetic scenes, a small Segmenter, workers, everything on."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from segtrain.cli import main
from segtrain.data.synthetic.writers import write_dataset
from segtrain.errors import REQUEUE
from segtrain.train.checkpoint import load_checkpoint
from segtrain.train.journal import read_journal
from segtrain.train.loop import Run
from tests.segtrain.test_train_resume import assert_equal_trees, whole_state


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_dataset(out=folder, fmt="folder", num=12, size=(48, 32), seed=0)
    return folder


@pytest.fixture
def config_file(scenes, tmp_path):
    content = {
        "data": {
            **{"dataset": "folder", "root": str(scenes), "workers": 2},
            **{"crop": [32, 32], "base_size": [48, 32]},
        },
        "model": {
            **{"name": "segmenter", "embed_dim": 24, "depth": 2, "num_heads": 2},
            **{"patch_size": 8, "decoder": "mask", "decoder_layers": 1},
        },
        "optim": {"name": "adamw", "lr": 2e-3, "weight_decay": 0.01, "clip_norm": 1.0},
        "train": {
            **{"iters": 20, "global_batch": 4, "micro_batch": 2, "ema_decay": 0.9},
            **{"eval_every": 20, "checkpoint_every": 50, "log_every": 5},
        },
        "output": str(tmp_path / "straight"),
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_20_updates_are_10_and_10_resumed(config_file, tmp_path, monkeypatch, capsys):
    """With two workers, augmentation, accumulation, running average, dropout, drop path."""
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    assert main(["train", "--config", str(config_file)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("mIoU ")
    assert "after 20 updates" in out
    assert "step 20/20  loss " in err
    report = Run.report

    def report_then_signal(run, losses, rate):
        report(run, losses, rate)
        if run.state.step == 10:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Run, "report", report_then_signal)
    assert main(["train", "--config", str(config_file), f"output={halves}"]) == REQUEUE
    assert f"go on with: segtrain resume {halves}" in capsys.readouterr().err
    assert torch.load(halves / "checkpoints/last.pt", weights_only=True)["step"] == 10
    monkeypatch.undo()
    assert main(["resume", str(halves), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert_equal_trees(whole_state(straight), whole_state(halves))
    assert results == json.loads((straight / "results.json").read_text())
    losses = [
        {r["step"]: r["loss"] for r in read_journal(run / "log.jsonl") if r["event"] == "train"}
        for run in (straight, halves)
    ]
    assert losses[0] == losses[1]
    assert list(losses[0]) == [5, 10, 15, 20]


def test_workers_and_accumulation_do_not_change_the_update(config_file, tmp_path):
    """Without dropout, whose numbers depend on how the batch is split."""
    still = ["model.decoder_dropout=0", "model.drop_path_rate=0", "train.iters=3"]
    runs = {
        "whole": ["data.workers=0", "train.micro_batch=4"],
        "parts": ["data.workers=1", "train.micro_batch=1"],
    }
    weights = []
    for name, options in runs.items():
        folder = tmp_path / name
        overrides = [*still, *options, f"output={folder}"]
        assert main(["train", "--config", str(config_file), *overrides]) == 0
        weights.append(whole_state(folder)["model"])
    for name in weights[0]:
        # AdamW divides tiny gradients by their own size, which magnifies rounding.
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-3, atol=1e-4)


def test_weights_of_a_run_start_another(config_file, tmp_path, capsys):
    assert main(["train", "--config", str(config_file), "train.iters=2"]) == 0
    best = tmp_path / "straight/checkpoints/best.safetensors"
    overrides = ["train.iters=1", f"init={best}", f"output={tmp_path / 'next'}"]
    capsys.readouterr()
    assert main(["train", "--config", str(config_file), *overrides]) == 0
    assert f"weights of {best}" in capsys.readouterr().err


def test_wrong_labels_stop_before_training(config_file, tmp_path, capsys):
    overrides = ["data.folder.classes=[disc, ring]", f"output={tmp_path / 'wrong'}"]
    assert main(["train", "--config", str(config_file), *overrides]) == 2
    assert "see: segtrain data check" in capsys.readouterr().err
    assert not (tmp_path / "wrong/config.yaml").exists()


def test_a_run_is_not_written_over(config_file, capsys):
    assert main(["train", "--config", str(config_file), "train.iters=1"]) == 0
    capsys.readouterr()
    assert main(["train", "--config", str(config_file), "train.iters=1"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "already holds a run; go on with it: segtrain resume" in err


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to groups of processes")
def test_a_signal_to_all_processes_of_a_run_saves_it(config_file, tmp_path):
    """As Slurm sends it, to the workers as well."""
    command = [sys.executable, "-m", "segtrain", "train", "--config", str(config_file)]
    command += ["train.iters=1000000", "train.eval_every=null"]
    run = tmp_path / "straight"
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 120
        while not is_training(run) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == REQUEUE, said
    assert f"go on with: segtrain resume {run}" in said.splitlines()[-1]
    last = list(read_journal(run / "log.jsonl"))[-1]
    assert load_checkpoint(run)["step"] == last["step"] > 0


def is_training(run):
    return any(record["event"] == "train" for record in read_journal(run / "log.jsonl"))
