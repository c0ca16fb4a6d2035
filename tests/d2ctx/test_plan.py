"""`python -m d2ctx.plan`: GO for good runs, NO-GO with the right reasons, nothing left behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ctx.errors import UserError
from d2ctx.evaluation import coco
from d2ctx.plan import flight as flights
from d2ctx.plan import forecast, rehearse
from d2ctx.plan.cli import main
from d2ctx.plan.flight import Flight, differences
from d2ctx.plan.forecast import Memory, checkpoints, duration, expected_seconds, forecast_memory
from d2ctx.plan.report import Report, explained
from d2ctx.plan.share import rehearsed, share_of
from d2ctx.trainer import Trainer
from tests.contracts.source_tree import ROOT

from . import tiny
from .plan_sabotage import SABOTAGES, detection, panoptic
from .toy_panoptic import panoptic_config, write_cityscapes

pytestmark = pytest.mark.usefixtures("isolated")
STEPS = [
    *("configuration", "checks", "model", "weights", "batch", "memory", "training", "evaluation"),
    *("results", "checkpoint", "time"),
]
INSTANT = sorted(str(p.relative_to(tiny.CONFIGS)) for p in tiny.CONFIGS.glob("*/*instant*.yaml"))


def files_of(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder but the user's cache, with contents."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.relative_to(folder).parts[0] != "cache"
    }


def planned(config: Path, capsys, *opts: object) -> dict:
    """The report; the folder, catalogs and cache must be as before."""
    folder, catalog = config.parent, set(DatasetCatalog.list())
    before = files_of(folder)
    capsys.readouterr()
    code = main(["--config-file", str(config), "--json", *map(str, opts)])
    assert files_of(folder) == before
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert code == (0 if report["go"] else 2), err
    assert report["go"] == (not report["reasons"])
    assert not [n for n in set(DatasetCatalog.list()) - catalog if n.endswith("first_image")]
    assert not [n for n in MetadataCatalog.list() if n.endswith("first_image")]
    return report


def states(report: dict) -> dict[str, str]:
    return {step["name"]: step["state"] for step in report["steps"]}


def lines(report: dict, name: str) -> str:
    return "\n".join(next(step for step in report["steps"] if step["name"] == name)["lines"])


# ---- GO --------------------------------------------------------------------------------------
def test_a_detector_is_a_go(tmp_path, capsys):
    report = planned(detection(tmp_path).config, capsys)
    assert report["reasons"] == []
    assert states(report) == dict.fromkeys(STEPS, "ok")
    facts = report["facts"]
    assert (facts["global_batch"], facts["images_per_process"], facts["processes"]) == (2, 2, 1)
    assert (facts["lr"], facts["iterations"], facts["train_images"]) == (0.001, 5, 4)
    assert facts["epochs"] == 2.5
    memory = facts["memory"]
    assert memory["peak"] == memory["fixed"] + 2 * memory["kept"] > memory["fixed"] > 0
    assert 0 < facts["disk"]["needed"] < facts["disk"]["free"]
    parts = facts["seconds"]
    assert parts["total"] == pytest.approx(sum(parts.values()) / 2)
    assert min(parts.values()) > 0
    assert "coco_instances_results.json" in lines(report, "results")
    assert "bbox AP" in lines(report, "evaluation")
    assert "segm AP" in lines(report, "evaluation")


def test_a_panoptic_model_is_a_go_and_both_its_results_are_checked(tmp_path, capsys):
    runway = panoptic(tmp_path)
    report = planned(runway.config, capsys)
    assert report["reasons"] == []
    assert states(report) == dict.fromkeys(STEPS, "ok")
    assert "coco_instances_results.json, panoptic_predictions.json" in lines(report, "results")
    assert "panoptic_seg PQ" in lines(report, "evaluation")
    kept = [path.name for path in (tmp_path / "cache/d2ctx").iterdir()]
    assert sum(name.startswith("panoptic-") for name in kept) == 2  # of the run's own sets


def test_text_ends_with_go(tmp_path, capsys):
    assert main(["--config-file", str(detection(tmp_path).config)]) == 0
    out, err = capsys.readouterr()
    said = out.splitlines()
    assert said[-1] == "GO"
    assert [line.split("  ")[0] for line in said if line[:1].strip()][:-1] == STEPS
    assert "saved, restored, the same bit for bit" in out
    assert "batch 2 = 1 process x 2 images, 5 iterations" in out
    assert "nothing is scaled: SOLVER.REFERENCE_WORLD_SIZE is 0" in out
    assert err == ""


def test_updates_are_those_of_the_run(tmp_path, capsys):
    """The losses of the rehearsal are the first ones of the journal of the real run."""
    runway = detection(tmp_path)
    opts = ("SEED", 3, "DATALOADER.NUM_WORKERS", 0)
    said = lines(planned(runway.config, capsys, *opts), "training")
    assert runway.launch.main(*opts) == 0
    records = [json.loads(line) for line in journal(runway).read_text().splitlines()]
    losses = [sum(r["losses"].values()) for r in records if "losses" in r]
    assert said.startswith("losses " + ", ".join(f"{loss:.4g}" for loss in losses[:2]) + ";")


def journal(runway) -> Path:
    (path,) = runway.launch.output.glob("*.jsonl")
    return path


def test_a_run_without_test_sets_is_never_evaluated(tmp_path, capsys):
    report = planned(detection(tmp_path).config, capsys, "DATASETS.TEST", "()")
    assert report["go"]
    assert [n for n, s in states(report).items() if s == "skipped"] == ["evaluation", "results"]
    assert "is never evaluated" in lines(report, "evaluation")


@pytest.mark.slow
def test_several_test_sets_are_all_evaluated(tmp_path, capsys):
    opts = ("DATASETS.TEST", "('toy_val','toy_train')")
    report = planned(detection(tmp_path).config, capsys, *opts)
    assert report["go"], report["reasons"]
    assert lines(report, "evaluation").count("bbox AP") == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_cityscapes_is_rehearsed_with_its_own_evaluators(tmp_path, capsys):
    write_cityscapes(tmp_path / "city", images=2)
    write_cityscapes(tmp_path / "city", split="train", images=2)
    entries = {
        f"city_{split}": {"ROOT": str(tmp_path / "city"), "SPLIT": split}
        for split in ("train", "val")
    }
    things = "MODEL.ROI_HEADS.NUM_CLASSES", 8, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 12
    cfg = panoptic_config(
        train=["city_train"], test=["city_val"], output=tmp_path / "run", CITYSCAPES=entries
    )
    cfg.merge_from_list(list(things))
    path = tmp_path / "run.yaml"
    path.write_text(cfg.dump())
    report = planned(path, capsys)
    assert report["reasons"] == []
    assert lines(report, "results").endswith("panoptic_predictions.json, cityscapes_instances")
    assert "segm AP" in lines(report, "evaluation")


def test_weights_that_are_not_loaded_are_listed(tmp_path, capsys):
    runway = detection(tmp_path)
    cfg = tiny.config("a2fpn/mask_rcnn_a2fpn_instant.yaml", "MODEL.ROI_HEADS.NUM_CLASSES", 3)
    state = Trainer.build_model(cfg).state_dict()
    rest = [name for name in state if not name.startswith("backbone.")]
    torch.save({n: v for n, v in state.items() if n not in rest}, tmp_path / "w.pth")
    report = planned(runway.config, capsys, "MODEL.WEIGHTS", tmp_path / "w.pth")
    assert report["go"], report["reasons"]
    assert report["facts"]["not_loaded"] == rest
    assert "roi_heads" in lines(report, "weights")


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """What the instant configurations need."""
    root = tmp_path_factory.mktemp("scenes")
    for name, form in (("synth", "coco"), ("synth_panoptic", "coco-panoptic")):
        command = [sys.executable, "-m", "segtrain", "data", "synth", "--out", str(root / name)]
        command += ["--format", form, "--num", "12", "--val-fraction", "0.25", "--seed", "1"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", INSTANT)
def test_every_shipped_instant_configuration_is_a_go(name, scenes, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(scenes))
    code = main(
        ["--config-file", str(tiny.CONFIGS / name), "--json", "OUTPUT_DIR", str(tmp_path / "run")]
    )
    report = json.loads(capsys.readouterr().out)
    assert report["reasons"] == []
    assert code == 0
    assert states(report) == dict.fromkeys(STEPS, "ok")
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


# ---- NO-GO -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * s.slow, id=n) for n, s in SABOTAGES.items()],
)
def test_sabotage_is_a_no_go_with_its_reason(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sabotage = SABOTAGES[name]
    runway = sabotage.make(tmp_path)
    if sabotage.harm:
        sabotage.harm(runway)
    opts = [text.replace("FOLDER", str(tmp_path)) for text in sabotage.opts]
    report = planned(runway.config, capsys, *opts)
    found = [(reason["step"], reason["text"]) for reason in report["reasons"]]
    assert [step for step, _ in found] == [step for step, _ in sabotage.reasons], found
    for (_, text), (_, part) in zip(found, sabotage.reasons, strict=True):
        assert part.replace("FOLDER", str(tmp_path)) in text
    assert (states(report).get("training", "skipped") != "skipped") == sabotage.tried


def test_no_go_in_words(tmp_path, capsys):
    config = detection(tmp_path).config
    torch.save({"a": torch.zeros(2)}, tmp_path / "w.pth")
    opts = ["SOLVER.BASE_LR", "1e30", "SOLVER.OPTIMIZER", "SGD"]
    opts += ["MODEL.WEIGHTS", str(tmp_path / "w.pth")]
    assert main(["--config-file", str(config), *opts]) == 2
    said = capsys.readouterr().out.splitlines()
    end = said.index("NO-GO, 2 reasons:")
    names = [line.split(":")[0] for line in said[end + 1 :] if line[2] != " "]
    assert names == ["  weights", "  training"]
    assert "training        FAILED" in said


def test_memory_that_is_not_there(tmp_path, capsys, monkeypatch):
    config = detection(tmp_path).config
    monkeypatch.setattr(forecast, "memory_of", lambda device: 1 << 20)
    report = planned(config, capsys)
    (reason,) = report["reasons"]
    assert reason["step"] == "memory"
    assert "with 2 images in a process, there are" in reason["text"]
    assert "lower SOLVER.IMS_PER_BATCH" in reason["text"]
    skipped = [name for name, state in states(report).items() if state == "skipped"]
    assert skipped == ["training", "evaluation", "results", "checkpoint"]
    monkeypatch.setattr(forecast, "memory_of", lambda device: None)
    assert planned(config, capsys)["go"]


def test_disk_that_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rehearse, "disk_free", lambda folder: 1000)
    (reason,) = planned(detection(tmp_path).config, capsys)["reasons"]
    assert reason["step"] == "checkpoint"
    assert "raise SOLVER.CHECKPOINT_PERIOD, or set OUTPUT_DIR" in reason["text"]


@pytest.mark.slow
def test_disk_that_is_full_while_saving(tmp_path, capsys, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    reasons = planned(detection(tmp_path).config, capsys)["reasons"]
    assert "No space left on device" in reasons[0]["text"]


def test_an_output_folder_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "d2ctx.preflight.settings.TemporaryDirectory",
        lambda dir: (_ for _ in ()).throw(OSError(30, "Read-only file system")),
    )
    monkeypatch.setattr(rehearse, "_home", lambda cfg: None)
    (reason,) = planned(detection(tmp_path).config, capsys)["reasons"]
    assert reason["step"] == "checks"
    assert "is not writable (Read-only file system); set OUTPUT_DIR" in reason["text"]


def test_an_evaluator_that_fails(tmp_path, capsys, monkeypatch):
    def broken(self):
        raise UserError("x is not y; write z")

    monkeypatch.setattr(coco.CocoEvaluator, "evaluate", broken)
    report = planned(detection(tmp_path).config, capsys)
    assert report["reasons"] == [{"step": "evaluation", "text": "x is not y; write z"}]
    assert states(report)["results"] == "skipped"
    assert states(report)["checkpoint"] == "ok"


def test_results_that_the_server_refuses(tmp_path, capsys, monkeypatch):
    def refused(results, truth, *, task):
        assert (task, len(truth["images"])) == ("both", 1)
        yield "result 0: score 2 is no number from 0 to 1"

    monkeypatch.setattr(flights, "coco_violations", refused)
    (reason,) = planned(detection(tmp_path).config, capsys)["reasons"]
    assert reason["step"] == "results"
    assert reason["text"].startswith("result 0: score 2")


@pytest.mark.parametrize(
    ("part", "named"),
    [
        (lambda t: next(iter(t.model.parameters())), "backbone."),
        (lambda t: next(iter(t.optimizer.state.values()))["exp_avg"], "trainer._trainer.optimizer"),
    ],
)
def test_a_checkpoint_that_is_not_what_was_saved(tmp_path, capsys, monkeypatch, part, named):
    load = Trainer.resume_or_load

    def one_number_off(trainer, resume=True):
        load(trainer, resume)
        if resume:
            part(trainer).data.view(-1)[0] += 1e-3

    monkeypatch.setattr(Trainer, "resume_or_load", one_number_off)
    (reason,) = planned(detection(tmp_path).config, capsys)["reasons"]
    assert reason["step"] == "checkpoint"
    assert f"not the same after saving and restoring: {named}" in reason["text"]


def test_weights_that_are_not_finite_though_the_losses_are(tmp_path, capsys, monkeypatch):
    step = Trainer.run_step

    def broken(trainer):
        step(trainer)
        if trainer.iter == 1:
            next(iter(trainer.model.parameters())).data.fill_(torch.nan)

    monkeypatch.setattr(Trainer, "run_step", broken)
    (reason,) = planned(detection(tmp_path).config, capsys)["reasons"]
    assert reason["step"] == "training"
    assert reason["text"].startswith("weights are not finite after 2 updates: backbone.")


@pytest.mark.parametrize(
    "place",
    ["run_step", *(pytest.param(p, marks=pytest.mark.slow) for p in ("test", "build_model"))],
)
def test_a_signal_ends_it_and_leaves_nothing(place, tmp_path, capsys, monkeypatch):
    config = detection(tmp_path).config
    before, method = files_of(tmp_path), getattr(Trainer, place)

    def stopped(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return method(*args)

    monkeypatch.setattr(Trainer, place, stopped)
    handler = signal.getsignal(signal.SIGTERM)
    assert main(["--config-file", str(config)]) == 75
    assert signal.getsignal(signal.SIGTERM) is handler
    assert capsys.readouterr().err == "the rehearsal was stopped; nothing of it is left\n"
    assert files_of(tmp_path) == before


def test_an_earlier_run_is_mentioned(tmp_path, capsys):
    runway = detection(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model_final.pth").write_bytes(b"x")
    report = planned(runway.config, capsys)
    assert report["go"]
    assert "holds 1 checkpoint of an earlier run" in lines(report, "checks")


def test_a_mistake_of_use_is_one_line(tmp_path, capsys):
    assert main(["--config-file", str(detection(tmp_path).config), "--num-gpus", "0"]) == 2
    assert "must be 1 or more, got 0 and 1" in capsys.readouterr().err


# ---- parts -----------------------------------------------------------------------------------
def test_the_share_of_one_process_has_the_runs_rates():
    cfg = tiny.config(
        *("a2fpn/mask_rcnn_a2fpn_instant.yaml", "SOLVER.IMS_PER_BATCH", 16),
        *("SOLVER.BASE_LR", 0.02, "SOLVER.MAX_ITER", 900, "SOLVER.REFERENCE_WORLD_SIZE", 8),
        *("SOLVER.STEPS", (600, 800), "TEST.EVAL_PERIOD", 100),
    )
    two = share_of(cfg, 2)
    assert two.facts() == {
        "processes": 2,
        "global_batch": 4,
        "images_per_process": 2,
        "lr": 0.005,
        "iterations": 3600,
    }
    assert "written for 8 processes (SOLVER.REFERENCE_WORLD_SIZE) as 0.02" in two.lines()[1]
    changed = rehearsed(two, output="x", weights="")
    assert (changed.SOLVER.IMS_PER_BATCH, changed.SOLVER.BASE_LR) == (2, 0.005)
    assert (changed.SOLVER.MAX_ITER, changed.SOLVER.STEPS) == (3600, (2400, 3200))
    assert (changed.SOLVER.REFERENCE_WORLD_SIZE, changed.TEST.EVAL_PERIOD) == (0, 0)
    same = share_of(cfg, 8)
    assert same.images == 2
    assert "as many as there are" in same.lines()[1]


def test_hours_and_checkpoints():
    cfg = tiny.config(
        *("a2fpn/mask_rcnn_a2fpn_instant.yaml", "SOLVER.MAX_ITER", 100),
        *("SOLVER.CHECKPOINT_PERIOD", 30, "TEST.EVAL_PERIOD", 40),
    )
    assert checkpoints(cfg) == 4  # 30, 60, 90 and the last
    found = expected_seconds(cfg, update=2.0, image=0.5, images=10, save=3.0)
    assert found == {"training": 200, "evaluation": 15, "saving": 12}  # evaluated at 40, 80, 100
    cfg.TEST.EVAL_PERIOD = 0
    assert expected_seconds(cfg, update=1, image=1, images=10, save=0)["evaluation"] == 10
    assert duration(3723.4) == "1:02:03"


def test_memory_is_what_autograd_keeps():
    cfg = tiny.config("a2fpn/mask_rcnn_a2fpn_instant.yaml", "SOLVER.OPTIMIZER", "SGD")

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(15))
            self.register_buffer("frozen", torch.ones(5))

        def forward(self, batch):
            assert len(batch) == 2
            images = torch.stack([image["image"] for image in batch]).float().clone()
            twice = images * self.weight[0]  # keeps the images
            return {"loss": (twice * self.weight).sum()}  # keeps what came of them, and weights

    class Mapper:
        def __init__(self, cfg, is_train):
            assert not cfg.INPUT.CROP.ENABLED
            assert tuple(cfg.INPUT.MIN_SIZE_TRAIN) == (128,)

        def __call__(self, record):
            return {"image": torch.zeros(3, record["height"], record["width"])}

    records = [
        {"height": h, "width": w, "annotations": some}
        for h, w, some in ((10, 10, [1]), (10, 15, [1]), (10, 30, [1]), (10, 12, []))
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forecast, "DatasetMapper", Mapper)
        cfg.INPUT.MAX_SIZE_TRAIN = 192
        cfg.INPUT.CROP.ENABLED = True
        found = forecast_memory(Model(), cfg, records, images=6)
    assert found.size == (10, 15)  # 128x192 after resizing; 10x30 becomes 64x192
    assert found.kept == pytest.approx(2 * 3 * 10 * 15 * 4, abs=8)
    assert found.fixed == 4 * (15 + 5) + 4 * 2 * 15
    assert found.peak == found.fixed + 6 * found.kept


def test_memory_that_fits_is_no_problem():
    memory = Memory(fixed=100, kept=200, images=3, there=700, size=(4, 4))
    assert memory.problem() is None
    assert "there are" in Memory(**(vars(memory) | {"there": 699})).problem()


def test_a_flight_makes_no_more_updates_than_the_run(tmp_path):
    runway = detection(tmp_path)
    cfg = rehearse.load_config(str(runway.config), ["SOLVER.MAX_ITER", "1"])
    cfg = rehearsed(share_of(cfg, 1), output=str(tmp_path / "flight"), weights="")
    (tmp_path / "flight").mkdir()
    flight = Flight(cfg)
    assert len(flight.train().losses) == 1
    assert flight.train_images == 4


def test_differences_are_named():
    a = {"x": torch.ones(2), "y": [{"z": 1}, "text"], "n": torch.tensor(torch.nan)}
    same = {"x": torch.ones(2), "y": [{"z": 1}, "text"], "n": torch.tensor(torch.nan)}
    assert list(differences(a, same)) == []
    other = {"x": torch.ones(2, dtype=torch.float64), "y": [{"z": 2}, "text"], "more": 1}
    assert list(differences(a, other)) == ["x", "y.0.z", "n", "more"]
    assert list(differences(torch.tensor([True]), torch.tensor([False]), "b")) == ["b"]
    assert list(differences([1], [1, 2], "list")) == ["list"]
    assert list(differences(1, True, "one")) == ["one"]


def test_unknown_errors_lead_to_their_place():
    assert explained(ValueError("x is 1; write x=2")) == "x is 1; write x=2"
    assert explained(RuntimeError("odd")) == (
        "RuntimeError: odd; see where it arose: python -m d2ctx.plan --traceback ..."
    )
    assert "lower SOLVER.IMS_PER_BATCH" in explained(MemoryError())
    worker = "Caught X in DataLoader worker process 0.\nOriginal Traceback\n  at\nX: it broke\n"
    assert explained(RuntimeError(worker)).startswith("RuntimeError: X: it broke; see where")
    report = Report()
    report.run("a", lambda step: 1 / 0)
    assert report.run("b", lambda step: 7) == 7
    assert [step.state for step in report.steps] == ["failed", "ok"]
