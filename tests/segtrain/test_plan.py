"""`segtrain plan`: GO for every method, NO-GO with the right reasons, and nothing left behind."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segtrain.cli import main
from segtrain.config.load import load_config
from segtrain.data.datasets import build_layout
from segtrain.files import run_lock
from segtrain.models import build_model
from segtrain.plan import forecast, rehearse
from segtrain.plan.flight import differences, first_image, rehearsed
from segtrain.plan.forecast import Memory, times_due
from segtrain.plan.report import Report, explained
from segtrain.train.loop import Run
from segtrain.train.state import TrainingState
from tests.segtrain.network_runs import write_config
from tests.segtrain.plan_sabotage import AFTER_DATA, SABOTAGES, SEGMENTER, SR, UNEPT
from tests.segtrain.test_models_timm import MLP, SMALL
from tests.segtrain.toy_network import CONTEXT, section
from tests.segtrain.toy_runs import write_folder
from tests.segtrain.toy_sr import DF2
from tests.segtrain.toy_unept import VIT

BOUNDARY = {"boundary": {"min_area": 4}}
# Name -> the section `model`, and others.
METHODS = {
    "segmenter": (SEGMENTER, {}),
    "segmenter linear": (SEGMENTER | {"decoder": "linear"}, {}),
    "sr": (SR, {}),
    "srnet": (SR | {"backbone": DF2, "head": {"name": "df", "channels": 16}, "aux": None}, {}),
    "fpt": (SR | {"head": {"name": "fpt", "channels": 16, "width": 16}}, {}),
    "unept": (UNEPT, {"loss": BOUNDARY}),
    "unept on vit": (UNEPT | {"backbone": VIT}, {"loss": BOUNDARY}),
    "mlp on timm": (SR | {"backbone": {"name": "timm", "model": SMALL}, "head": MLP}, {}),
}
STEPS = [
    *("configuration", "output", "data set", "labels", "memory", "weights", "batches"),
    *("training", "evaluation", "checkpoint", "submission", "time"),
]


def files_of(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder, with contents."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def planned(folder: Path, capsys, model=SEGMENTER, *overrides: str, **sections) -> dict:
    """The report; the folder must be as before."""
    path = folder / "tiny.yaml"
    if not path.exists():
        path = write_config(folder, model, **sections)
    before = files_of(folder)
    capsys.readouterr()
    code = main(["plan", "--config", str(path), "--json", *overrides])
    assert files_of(folder) == before
    report = json.loads(capsys.readouterr().out)
    assert code == (0 if report["go"] else 2)
    assert report["go"] == (not report["reasons"])
    return report


def states(report: dict) -> dict[str, str]:
    return {step["name"]: step["state"] for step in report["steps"]}


# ---- GO ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_go(method, tmp_path, capsys):
    model, sections = METHODS[method]
    train = {"iters": 40, "global_batch": 4, "micro_batch": 2, "eval_every": 15}
    report = planned(tmp_path, capsys, model, **{"train": train, **sections})
    assert report["reasons"] == []
    assert states(report) == dict.fromkeys(STEPS, "ok")
    facts = report["facts"]
    assert (facts["global_batch"], facts["micro_batch"], facts["passes"]) == (4, 2, 2)
    assert (facts["lr"], facts["classes"]) == (0.01, 19)
    assert facts["images"] == {"train": 2, "val": 2}
    assert facts["memory"]["peak"] == facts["memory"]["fixed"] + facts["memory"]["kept"] > 0
    assert 0 < facts["disk"]["needed"] < facts["disk"]["free"]
    parts = facts["seconds"]
    assert parts["total"] == pytest.approx(sum(parts.values()) / 2)
    assert min(parts.values()) > 0


def test_text_ends_with_go(tmp_path, capsys):
    path = write_config(tmp_path, SEGMENTER)
    assert main(["plan", "--config", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "GO"
    assert [line.split("  ")[0] for line in lines if line[:1].strip()][:-1] == STEPS
    said = "\n".join(lines)
    assert "saved, restored, the same bit for bit" in said
    assert "batch 2 = 1 process x 1 pass x 2 images" in said
    assert "by cityscapesScripts" in said


def test_a_data_set_without_a_server_has_no_submission(tmp_path, capsys):
    root = tmp_path / "mine"
    for split in ("train", "val"):
        write_folder(root, split=split)
    data = {"dataset": "folder", "root": str(root), "crop": [16, 16], "base_size": [72, 18]}
    report = planned(tmp_path, capsys, data=data | {"workers": 1})
    assert states(report) == dict.fromkeys([s for s in STEPS if s != "submission"], "ok")


def test_updates_are_those_of_the_run_and_one_image_is_evaluated(tmp_path, capsys, monkeypatch):
    """The losses of the rehearsal are the first ones of the journal of the real run."""
    path = write_config(tmp_path, SR, train={"iters": 4, "global_batch": 2, "log_every": 1})
    seen = []
    evaluate = Run.evaluate
    monkeypatch.setattr(Run, "evaluate", lambda run: (evaluate(run), seen.append(run.results)))
    report = planned(tmp_path, capsys)
    said = next(s for s in report["steps"] if s["name"] == "training")["lines"][0]
    assert main(["train", "--config", str(path)]) == 0
    records = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    losses = [f"{r['loss']:.4g}" for r in records if r["event"] == "train"]
    assert said.startswith(f"losses {', '.join(losses[:2])};")
    assert [r["images"] for r in seen] == [1, 2]


def test_weights_that_are_not_loaded_are_listed(tmp_path, capsys):
    report = planned(tmp_path, capsys, SR)
    assert report["facts"]["not_loaded"] == []  # none were asked for
    model = build_model(section(head=CONTEXT), 19, image_size=(32, 48))
    state = {n: v for n, v in model.state_dict().items() if n.startswith("backbone.")}
    torch.save(state, tmp_path / "r.pth")
    report = planned(tmp_path, capsys, SR, f"model.backbone.pretrained={tmp_path}/r.pth")
    assert report["go"], report["reasons"]
    names = [n for n, _ in model.named_parameters() if not n.startswith("backbone.")]
    assert report["facts"]["not_loaded"] == names
    said = next(s for s in report["steps"] if s["name"] == "weights")["lines"]
    assert said[-1].startswith("not loaded, random at first: head ")


# ---- NO-GO -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SABOTAGES)
def test_sabotage_is_a_no_go_with_its_reason(name, tmp_path, capsys):
    sabotage = SABOTAGES[name]
    write_config(tmp_path, sabotage.model or SEGMENTER)
    if sabotage.harm:
        sabotage.harm(tmp_path)
    keys = [text.replace("FOLDER", str(tmp_path)) for text in sabotage.overrides]
    report = planned(tmp_path, capsys, SEGMENTER, *keys)
    found = [(reason["step"], reason["text"]) for reason in report["reasons"]]
    assert [step for step, _ in found] == [step for step, _ in sabotage.reasons], found
    for (_, text), (_, part) in zip(found, sabotage.reasons, strict=True):
        assert part in text
    skipped = [step for step, state in states(report).items() if state == "skipped"]
    assert skipped == list(sabotage.skipped)


def test_without_data_their_number_of_classes_may_be_known(tmp_path, capsys):
    data = {"dataset": "folder", "root": "none", "crop": [16, 16], "base_size": [72, 18]}
    report = planned(tmp_path, capsys, data=data)
    unknown = {step for step, state in states(report).items() if state == "skipped"}
    assert unknown == {"memory", "weights", *AFTER_DATA}
    report = planned(tmp_path, capsys, SEGMENTER, "data.folder.classes=[a,b]", "init=none.pth")
    assert [reason["step"] for reason in report["reasons"]] == ["data set", "weights"]
    assert states(report)["memory"] == "ok"


def test_a_split_without_labels_cannot_be_scored(tmp_path, capsys):
    root, pixels = tmp_path / "ade", np.random.default_rng(0).integers(0, 151, (24, 36), np.uint8)
    for below in ("images/training", "annotations/training", "images/test"):
        (root / below).mkdir(parents=True)
        rows = pixels if below.startswith("annotations") else np.stack([pixels] * 3, -1)
        Image.fromarray(rows).save(root / below / f"{below[-4:]}.png")
    data = {"dataset": "ade20k", "root": str(root), "crop": [16, 16], "base_size": [72, 18]}
    report = planned(tmp_path, capsys, data=data | {"val_split": "test"})
    found = [(reason["step"], reason["text"]) for reason in report["reasons"]]
    assert [step for step, _ in found] == ["labels", "evaluation"], found
    assert "take another split (data.val_split)" in found[0][1]
    assert "has no labels; take another split" in found[1][1]


def test_no_go_in_words(tmp_path, capsys):
    path = write_config(tmp_path, SR)
    assert main(["plan", "--config", str(path), "optim.lr=1e30", f"init={tmp_path}/a.pth"]) == 2
    lines = capsys.readouterr().out.splitlines()
    end = lines.index("NO-GO, 2 reasons:")
    assert [line.split(":")[0] for line in lines[end + 1 :]] == ["  weights", "  training"]
    assert "training        FAILED" in lines


def test_output_in_use(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    with run_lock(tmp_path / "run"):
        report = planned(tmp_path, capsys)
    assert [reason["step"] for reason in report["reasons"]] == ["output"]
    assert "is in use by process" in report["reasons"][0]["text"]
    assert planned(tmp_path, capsys)["go"]


def test_memory_that_is_not_there(tmp_path, capsys, monkeypatch):
    write_config(tmp_path, SR)
    fixed, kept = (planned(tmp_path, capsys)["facts"]["memory"][k] for k in ("fixed", "kept"))
    monkeypatch.setattr(forecast, "_memory_of", lambda device: int((fixed + 0.6 * kept) / 0.9))
    report = planned(tmp_path, capsys)
    (reason,) = report["reasons"]
    assert reason["step"] == "memory"
    assert reason["text"].endswith("write train.micro_batch: 1")
    assert [name for name, state in states(report).items() if state == "skipped"] == [
        *("batches", "training", "evaluation", "checkpoint")
    ]
    monkeypatch.setattr(forecast, "_memory_of", lambda device: fixed)
    assert "lower data.crop" in planned(tmp_path, capsys)["reasons"][0]["text"]
    monkeypatch.setattr(forecast, "_memory_of", lambda device: None)
    assert planned(tmp_path, capsys)["go"]


def test_disk_that_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rehearse, "disk_free", lambda folder: 1000)
    (reason,) = planned(tmp_path, capsys)["reasons"]
    assert reason["step"] == "checkpoint"
    assert "lower train.keep" in reason["text"]


def test_disk_that_is_full_while_saving(tmp_path, capsys, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("segtrain.train.loop.save_checkpoint", full)
    report = planned(tmp_path, capsys)
    assert report["reasons"][0]["step"] == "checkpoint"
    assert "make room, or write output=" in report["reasons"][0]["text"]


def test_a_checkpoint_that_is_not_what_was_saved(tmp_path, capsys, monkeypatch):
    load = TrainingState.load_state_dict

    def one_bit_off(state, saved):
        load(state, saved)
        next(iter(state.model.parameters())).data.view(-1)[0] += 1e-3

    monkeypatch.setattr(TrainingState, "load_state_dict", one_bit_off)
    (reason,) = planned(tmp_path, capsys)["reasons"]
    assert reason["text"].startswith("not the same after saving and restoring: model.encoder.")


def test_a_weight_file_that_is_not_what_was_evaluated(tmp_path, capsys, monkeypatch):
    """It holds the running average, not the weights in training."""
    keys = ("train.ema_decay=0.9",)
    assert planned(tmp_path, capsys, SEGMENTER, *keys)["go"]
    monkeypatch.setattr(TrainingState, "evaluated_model", lambda state: state.model)
    export = Run.export
    monkeypatch.setattr(Run, "export", lambda run, model: export(run, run.state.average.module))
    (reason,) = planned(tmp_path, capsys, SEGMENTER, *keys)["reasons"]
    assert reason["text"].startswith("not the same after saving and restoring: weights.")


def test_results_that_the_server_refuses(tmp_path, capsys, monkeypatch):
    found = ["a.png: 3x4 pixels, expected 64x32"]
    monkeypatch.setattr("segtrain.evaluation.submission.violations", lambda *_: iter(found))
    assert planned(tmp_path, capsys)["reasons"] == [{"step": "submission", "text": found[0]}]


def test_weights_that_are_not_finite_though_the_losses_are(tmp_path, capsys, monkeypatch):
    step = Run.step_optimizer

    def broken(run):
        step(run)
        if run.state.step == 1:
            next(iter(run.state.model.parameters())).data.fill_(torch.nan)

    monkeypatch.setattr(Run, "step_optimizer", broken)
    (reason,) = planned(tmp_path, capsys)["reasons"]
    assert reason["step"] == "training"
    assert reason["text"].startswith("weights are not finite after 2 updates")


@pytest.mark.parametrize("place", ["update", "evaluate", "save"])
def test_a_signal_ends_it_and_leaves_nothing(place, tmp_path, capsys, monkeypatch):
    path = write_config(tmp_path, SEGMENTER)
    before = files_of(tmp_path)
    method = getattr(Run, place)

    def stopped(run, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return method(run, *args)

    monkeypatch.setattr(Run, place, stopped)
    handler = signal.getsignal(signal.SIGTERM)
    assert main(["plan", "--config", str(path)]) == 75
    assert signal.getsignal(signal.SIGTERM) is handler
    assert capsys.readouterr().err == "segtrain: the rehearsal was stopped; nothing of it is left\n"
    assert files_of(tmp_path) == before


def test_several_processes_are_refused(tmp_path, capsys, monkeypatch):
    path = write_config(tmp_path, SEGMENTER)
    monkeypatch.setattr("segtrain.dist.world_size", lambda: 2)
    assert main(["plan", "--config", str(path)]) == 2
    assert "start it without torchrun" in capsys.readouterr().err


# ---- parts -------------------------------------------------------------------------------------
def test_differences_are_named():
    a = {"x": torch.ones(2), "y": [{"z": 1}, "text"], "n": torch.tensor(torch.nan)}
    same = {"x": torch.ones(2), "y": [{"z": 1}, "text"], "n": torch.tensor(torch.nan)}
    assert list(differences(a, same)) == []
    other = {"x": torch.ones(2, dtype=torch.float64), "y": [{"z": 2}, "text"], "more": 1}
    assert list(differences(a, other)) == ["x", "y.0.z", "n", "more"]
    assert list(differences(torch.ones(2), torch.ones(3), "a")) == ["a"]
    assert list(differences(torch.tensor([True]), torch.tensor([False]), "b")) == ["b"]
    assert list(differences(torch.tensor([True]), torch.tensor([True]), "b")) == []
    assert list(differences([1], [1, 2], "list")) == ["list"]
    assert list(differences(1, True, "one")) == ["one"]


def test_what_happens_how_often():
    assert times_due(10, None) == 1
    assert times_due(10, 3) == 4  # after 3, 6, 9 and 10
    assert times_due(10, 5) == 2
    assert times_due(10, 3, 2) == 7  # after 2, 3, 4, 6, 8, 9 and 10
    assert times_due(10, 20) == 1


def test_the_micro_batch_that_fits_divides_the_global_one(tmp_path):
    options = load_config(write_config(tmp_path, SEGMENTER)).train
    options = options.model_copy(update={"global_batch": 12})
    memory = Memory(fixed=100, kept=1200, images=12, there=700)  # room for 5.3 images
    assert memory.problem(options).endswith("write train.micro_batch: 4")
    assert Memory(fixed=100, kept=1200, images=12, there=1300).problem(options) is None


def test_the_rehearsal_has_the_schedule_of_the_run(tmp_path):
    path = write_config(tmp_path, SEGMENTER, train={"iters": 50, "global_batch": 2})
    run = load_config(path, ["train.eval_every=1", "train.checkpoint_every=1"])
    changed = rehearsed(run)
    assert (changed.train.iters, changed.train.eval_every) == (50, None)
    assert changed.schedule == run.schedule
    assert rehearsed(load_config(path, ["train.iters=1"])).train.iters == 3


def test_unknown_errors_lead_to_their_place():
    assert explained(ValueError("x is 1; write x=2")) == "x is 1; write x=2"
    assert explained(ValueError("odd")).startswith("odd; see where it arose")
    assert explained(RuntimeError("odd")) == (
        "RuntimeError: odd; see where it arose: segtrain --traceback plan ..."
    )
    assert explained(MemoryError()).endswith("; lower train.micro_batch or data.crop")
    report = Report()
    report.run("a", lambda step: 1 / 0)
    assert report.run("b", lambda step: 7) == 7
    assert [step.state for step in report.steps] == ["failed", "ok"]


def test_one_image_of_every_split(tmp_path):
    layout = build_layout(load_config(write_config(tmp_path, SEGMENTER)).data)
    for split in ("train", "val"):
        assert first_image(layout).samples(split) == layout.samples(split)[:1]
