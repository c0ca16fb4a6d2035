"""Training, evaluating and resuming from the command line, and how users' errors end it."""

import copy
import re
import subprocess
import sys

import pytest
import torch
from detectron2.engine import DefaultTrainer

from d2ctx.runs import run_config, run_metrics
from d2ctx.train_net import EPILOG
from d2ctx.trainer import Trainer
from tests.contracts.source_tree import ROOT

from .launch import MAX_ITER

pytestmark = pytest.mark.usefixtures("isolated")


def final_state(output) -> dict:
    return torch.load(output / "model_final.pth", weights_only=True)


def same(results: dict[str, dict]) -> dict:
    return {task: pytest.approx(scores, nan_ok=True) for task, scores in results.items()}


# ---- training and evaluation -----------------------------------------------------------------
def test_training_leaves_everything_that_describes_it(finished):
    output = finished.output
    assert run_config(output).SOLVER.MAX_ITER == MAX_ITER
    assert "PyTorch" in (output / "environment.txt").read_text()
    assert "Starting training from iteration 0" in (output / "log.txt").read_text()
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    assert final_state(output)["iteration"] == MAX_ITER - 1
    assert [r["iteration"] for r in run_metrics(output) if "total_loss" in r] == [MAX_ITER - 1]


def test_training_ends_with_results_of_boxes_and_masks(finished):
    results = finished.results()
    assert set(results) == {"bbox", "segm"}
    for scores in results.values():
        assert 0 <= scores["AP"] <= scores["AP50"] <= 100


def test_evaluating_the_final_weights_gives_the_same_results(finished, tmp_path):
    weights = finished.output / "model_final.pth"
    assert finished.main("--eval-only", "MODEL.WEIGHTS", weights, "OUTPUT_DIR", tmp_path) == 0
    assert finished.results(tmp_path) == same(finished.results())
    assert finished.detections(tmp_path) == finished.detections() != []


def test_evaluation_alone_trains_nothing(finished, tmp_path):
    output = tmp_path / "evaluation"
    assert finished.main("--eval-only", "OUTPUT_DIR", output) == 0
    assert {path.name for path in output.iterdir()} == {
        "config.yaml",
        "environment.txt",
        "inference",
        "log.txt",
        "results.json",
    }


# ---- resuming --------------------------------------------------------------------------------
class CrashError(Exception):
    """What a power cut is to a run."""


@pytest.fixture
def train(launch, monkeypatch):
    """Train, and return by iteration the state that each step started from."""

    def train(*args: object, crash_at: int | None = None) -> dict[int, dict]:
        starts = {}

        def run_step(trainer: Trainer) -> None:
            if trainer.iter == crash_at:
                raise CrashError
            starts[trainer.iter] = {
                "lr": trainer.optimizer.param_groups[0]["lr"],
                "weights": copy.deepcopy(trainer.model.state_dict()),
                "averages": copy.deepcopy(trainer.optimizer.state_dict()["state"]),
            }
            DefaultTrainer.run_step(trainer)

        monkeypatch.setattr(Trainer, "run_step", run_step)
        if crash_at is None:
            assert launch.main(*args) == 0
        else:
            with pytest.raises(CrashError):
                launch.main(*args)
        return starts

    return train


@pytest.mark.parametrize(
    ("optimizer", "average"), [("SGD", "momentum_buffer"), ("AdamW", "exp_avg_sq")]
)
def test_an_interrupted_run_continues_as_if_nothing_had_happened(
    train, launch, tmp_path, optimizer, average
):
    opts = ["SOLVER.OPTIMIZER", optimizer, "SOLVER.CHECKPOINT_PERIOD", 2]
    whole = train(*opts, "OUTPUT_DIR", tmp_path / "whole")
    before = train(*opts, crash_at=3)
    after = train("--resume", *opts)
    assert list(before) == [0, 1, 2]
    assert list(after) == [2, 3, 4]  # the checkpoint holds iterations 0 and 1
    torch.testing.assert_close(after[2], before[2], rtol=0, atol=0)
    assert all(average in averages for averages in after[2]["averages"].values())
    resumed = {**before, **after}
    assert [resumed[i]["lr"] for i in whole] == [start["lr"] for start in whole.values()]
    end, expected = final_state(launch.output), final_state(tmp_path / "whole")
    assert end["iteration"] == expected["iteration"] == MAX_ITER - 1
    assert end["trainer"]["hooks"] == expected["trainer"]["hooks"]


def test_an_interrupted_run_has_no_results(train, launch):
    train(crash_at=1)
    assert not (launch.output / "results.json").exists()
    assert not (launch.output / "model_final.pth").exists()


def test_without_resume_the_run_starts_again(train):
    train("SOLVER.CHECKPOINT_PERIOD", 1, crash_at=1)
    assert list(train()) == list(range(MAX_ITER))


def test_resuming_a_finished_run_only_evaluates_it_again(train, launch):
    train()
    results = launch.results()
    (launch.output / "results.json").unlink()
    assert train("--resume") == {}
    assert launch.results() == same(results)


def test_a_checkpoint_without_optimizer_is_not_resumed(train, launch, capsys):
    train("SOLVER.CHECKPOINT_PERIOD", 1, crash_at=1)
    path = launch.output / "model_0000000.pth"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["trainer"]["_trainer"]
    torch.save(checkpoint, path)
    assert launch.main("--resume") == 2
    assert "no state of the optimizer (Detectron2 0.5 writes none)" in capsys.readouterr().err


# ---- errors of users -------------------------------------------------------------------------
def missing_json(launch):
    launch.train.json_file.unlink()
    return []


def corrupt_image(launch):
    path = launch.train.image_root / launch.train.images[0]["file_name"]
    path.write_bytes(path.read_bytes()[:200])
    return []


def unknown_key(launch):
    return ["SOLVER.MAX_ITR", 3]


def absent_device(launch):
    return ["MODEL.DEVICE", "cuda"]


def wrong_class_count(launch):
    return ["MODEL.ROI_HEADS.NUM_CLASSES", 80]


def unknown_lateral(launch):
    return ["MODEL.A2FPN.LATERAL", "mcg"]


def absent_level(launch):
    return ["MODEL.RPN.IN_FEATURES", "['p7']"]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (missing_json, "toy_train.json does not exist; correct DATASETS.COCO_FORMAT.toy_train"),
        (corrupt_image, "cannot be decoded (toy_train_1.jpg"),
        (unknown_key, "unknown key SOLVER.MAX_ITR; did you mean SOLVER.MAX_ITER?"),
        (absent_device, "no CUDA device is available here; add MODEL.DEVICE cpu"),
        (wrong_class_count, "toy_train has 3 classes (disc, square, star)"),
        (unknown_lateral, "MODEL.A2FPN: lateral"),
        (absent_level, "MODEL.RPN.IN_FEATURES names ['p7'], but build_resnet_a2fpn_backbone gives"),
    ],
)
def test_a_mistake_is_one_line_before_any_file_is_written(
    launch, monkeypatch, capsys, mistake, message
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert launch.main(*mistake(launch)) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    assert not launch.output.exists()


def foreign_weights(folder):
    path = folder / "foreign.pth"
    torch.save({f"layer{i}.weight": torch.zeros(2) for i in range(9)}, path)
    return ["MODEL.WEIGHTS", path]


def boxes_by_class(folder):
    return ["MODEL.ROI_HEADS.NAME", "ContextCascadeROIHeads"]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (foreign_weights, "foreign.pth does not fit the model: 0% of its tensors have a place"),
        (boxes_by_class, "ContextCascadeROIHeads refines class-agnostic boxes; set MODEL.ROI_BOX"),
    ],
)
def test_a_mistake_that_only_the_model_shows_ends_before_the_first_step(
    launch, tmp_path, capsys, mistake, message
):
    assert launch.main(*mistake(tmp_path)) == 2
    out, err = capsys.readouterr()
    assert f"error: {message}" in err.replace(f"{tmp_path}/", "")
    assert err.count("error: ") == 1
    assert "Traceback" not in out + err + (launch.output / "log.txt").read_text()
    assert not list(launch.output.glob("*.pth"))
    assert "Starting training" not in out


# ---- the script ------------------------------------------------------------------------------
def script(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "projects/train_net.py", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_help_of_the_script_shows_the_examples():
    done = script("--help")
    assert done.returncode == 0
    assert EPILOG in done.stdout


def test_the_script_passes_the_exit_code_on():
    done = script("--config-file", "no_such.yaml")
    assert done.returncode == 2
    assert done.stderr == "error: configuration file: no_such.yaml does not exist; check the path\n"


def test_the_configuration_of_the_examples_exists():
    (config,) = re.findall(r"--config-file (\S+)", EPILOG)
    assert (ROOT / config).is_file()
