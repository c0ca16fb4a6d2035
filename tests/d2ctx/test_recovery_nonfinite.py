"""An update with NaN or infinity is dropped, recorded, dealt with, and can be looked at again."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.structures import (
    BitMasks,
    Boxes,
    Instances,
    Keypoints,
    PolygonMasks,
    RotatedBoxes,
)
from detectron2.utils.events import EventStorage
from torch import nn

from d2ctx import UserError, replay
from d2ctx.recovery import nonfinite
from d2ctx.recovery.batches import from_plain, to_plain
from d2ctx.recovery.blackbox import examine, read_box
from d2ctx.recovery.journal import read_journal
from d2ctx.recovery.nonfinite import Policy
from d2ctx.recovery.stream import ExactLoader
from d2ctx.recovery.updates import GuardedTrainer
from tests.d2ctx import tiny
from tests.d2ctx.launch import MAX_ITER, Launch
from tests.d2ctx.test_train_net import final_state

FINITE, SOME_NAN = [torch.tensor([[1.0, 2.0]])], [torch.tensor([[1.0, math.nan]])]


class Net(nn.Module):
    """A norm with statistics, dropout, and two losses."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.head = nn.BatchNorm1d(2), nn.Dropout(), nn.Linear(2, 2)

    def forward(self, batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        x = torch.cat([*batch, torch.zeros(3, 2)])
        x = self.drop(self.norm(x))
        if not torch.isfinite(x).all():
            raise FloatingPointError("as Detectron2's proposals do")
        y = self.head(x)
        return {"a": y.square().mean(), "b": y.abs().sum()}


class Root(nn.Module):
    """A finite loss whose gradient is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(2))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        self.seen += 1
        return {"root": self.scale.abs().sqrt().sum()}


def guarded(model: nn.Module, batches: list, *, amp: bool = False, asked: bool = False):
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return GuardedTrainer(model.train(), batches, optimizer, amp=amp, asked=lambda: asked)


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


# ---- one update ------------------------------------------------------------------------------
def test_a_good_update_is_that_of_detectron2():
    torch.manual_seed(0)
    ours, theirs = Net(), Net()
    theirs.load_state_dict(ours.state_dict())
    logged = []
    for trainer in (guarded(ours, [FINITE] * 3), None):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
        trainer = trainer or SimpleTrainer(theirs, [FINITE] * 3, optimizer)
        with EventStorage() as storage:
            for trainer.iter in range(3):
                trainer.run_step()
        logged.append({name: storage.latest()[name][0] for name in ("a", "b", "total_loss")})
    assert equal(ours.state_dict(), theirs.state_dict())
    assert logged[0] == logged[1]


@pytest.mark.parametrize(("model", "bad"), [(Net, SOME_NAN), (Root, FINITE)])
def test_a_bad_update_changes_nothing(model, bad):
    trainer = guarded(model(), [FINITE, bad])
    if model is Net:
        with EventStorage():
            trainer.run_step()
    before, state = copied(trainer.plain), trainer.optimizer.state_dict()
    trainer._batches = iter([bad])
    with EventStorage() as storage:
        trainer.run_step()
    assert "total_loss" not in storage.latest()
    assert equal(trainer.plain.state_dict(), before)
    assert trainer.optimizer.state_dict()["state"].keys() == state["state"].keys()
    assert all(p.grad is None for p in trainer.plain.parameters())
    assert trainer.failure.finite == [False]
    broken = {name for name, v in trainer.failure.values.items() if not math.isfinite(v)}
    assert broken == ({"loss", "gradient"} if model is Net else {"gradient"})


def test_a_good_update_after_a_bad_one_forgets_it():
    trainer = guarded(Net(), [SOME_NAN, FINITE])
    with EventStorage():
        trainer.run_step()
        trainer.run_step()
    assert trainer.failure is None
    assert set(trainer.losses) == {"a", "b"}


def test_a_large_gradient_is_no_infinite_one():
    model = nn.Linear(2, 1, bias=False)
    model.forward = lambda batch: {"a": model.weight.sum() * 1e30}  # its square is infinite
    trainer = guarded(model, [FINITE])
    with EventStorage():
        trainer.run_step()
    assert trainer.failure is None


def test_mixed_precision_leaves_gradients_to_the_scaler():
    trainer = guarded(Root(), [FINITE], amp=True)
    with EventStorage():
        trainer.run_step()
    assert trainer.failure is None
    assert trainer.state_dict()["grad_scaler"]["scale"] == 2.0**15  # halved
    assert torch.equal(trainer.plain.scale.detach(), torch.zeros(2))


def test_the_state_of_the_scaler_is_restored():
    state = guarded(Net(), [], amp=True).state_dict()
    state["grad_scaler"]["scale"] = 4.0
    trainer = guarded(Net(), [], amp=True)
    trainer.load_state_dict(state)
    assert trainer.grad_scaler.get_scale() == 4.0


def test_an_error_that_is_not_about_numbers_is_not_caught():
    model = Net()
    model.forward = lambda batch: (_ for _ in ()).throw(AssertionError("a shape"))
    with pytest.raises(AssertionError, match="a shape"), EventStorage():
        guarded(model, [FINITE]).run_step()


def test_in_evaluation_detectron2s_exceptions_stay():
    trainer = guarded(Net(), [FINITE])
    with EventStorage():
        trainer.run_step()
    with pytest.raises(FloatingPointError):
        trainer.plain(SOME_NAN)


def test_a_signal_is_told_with_the_losses():
    trainer = guarded(Net(), [FINITE], asked=True)
    with EventStorage():
        trainer.run_step()
    assert trainer.stopping


# ---- a second look ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("model", "bad", "first"),
    [(Net, SOME_NAN, ("(model)", "input")), (Root, FINITE, ("(model)", "gradient"))],
)
def test_a_second_look_finds_the_place_and_leaves_no_trace(model, bad, first):
    trainer = guarded(model(), [bad])
    before = copied(trainer.plain)
    with EventStorage():
        trainer.run_step()
        torch.manual_seed(5)
        drawn = torch.rand(3)
        torch.manual_seed(5)
        found = examine(trainer, trainer.failure)
    assert (found["first"]["module"], found["first"]["kind"]) == first
    assert torch.equal(torch.rand(3), drawn)
    assert equal(trainer.plain.state_dict(), before)


def test_a_second_look_draws_the_same_numbers():
    model, drawn = nn.Linear(1, 1), []

    def forward(batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        drawn.append((torch.rand(()).item(), float(np.random.rand())))
        return {"a": model.weight.sum() * math.nan}

    model.forward = forward
    trainer = guarded(model, [FINITE])
    with EventStorage():
        trainer.run_step()
        torch.rand(3)
        examine(trainer, trainer.failure)
    assert drawn[0] == drawn[1]


# ---- policies --------------------------------------------------------------------------------
def test_an_unknown_policy_is_refused():
    with pytest.raises(UserError, match="must be one of stop, skip, rewind, got 'ignore'"):
        Policy("ignore")


@dataclass
class Poisoned:
    """A run in which the images of some batches of the first order are NaN."""

    launch: Launch
    numbers: tuple[int, ...] = ()

    @property
    def output(self) -> Path:
        return self.launch.output

    def poison(self, *numbers: int) -> None:
        self.numbers = numbers

    def train(self, *args: object, resume: bool = False) -> int:
        resume = ["--resume"] if resume else []
        return self.launch.main(*resume, "SEED", 3, "DATASETS.TEST", "()", *args)


@pytest.fixture
def poisoned(launch, monkeypatch):
    run, batches = Poisoned(launch), ExactLoader.__iter__

    def poisonous(loader: ExactLoader):
        for batch in batches(loader):
            if loader.done - 1 in run.numbers and not loader.detours:
                image = batch[1]["image"]
                batch[1]["image"] = torch.full_like(image, math.nan, dtype=torch.float)
            yield batch

    monkeypatch.setattr(ExactLoader, "__iter__", poisonous)
    return run


def boxes(launch) -> list[Path]:
    return sorted((launch.output / "nonfinite").glob("*.pt"))


def test_stop_records_and_says_how_to_go_on(poisoned, capsys):
    poisoned.poison(2)
    assert poisoned.train("SOLVER.CHECKPOINT_PERIOD", 2) == 2
    out, err = capsys.readouterr()
    (box,) = boxes(poisoned)
    assert err.splitlines()[-1] == (
        "error: iteration 2: loss nan, gradient nan; first in input of (model); look with: "
        f"python -m d2ctx.replay {box}; go on from the last checkpoint with the same command and "
        "--resume, to leave out such updates with SOLVER.ON_NONFINITE skip"
    )
    assert "Traceback" not in out + err + (poisoned.output / "log.txt").read_text()
    assert read_journal(poisoned.output)[-1]["losses"] == {"loss": "nan", "gradient": "nan"}
    beside = json.loads(box.with_suffix(".json").read_text())
    assert beside["iteration"] == 2
    assert beside["first"]["kind"] == "input"
    weights = read_box(box)["model"]
    last = torch.load(poisoned.output / "model_0000001.pth", weights_only=True)["model"]
    assert equal(weights, last)  # no update in between
    assert poisoned.train("SOLVER.ON_NONFINITE", "skip", resume=True) == 0

    assert replay.main([str(box)]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("iteration 2: loss nan"))
    assert lines[start + 1].startswith(
        "first input that is not finite: (model) (largest |input| nan"
    )


def test_skip_leaves_out_the_update_alone(poisoned, capsys):
    poisoned.poison(1, 3)
    assert poisoned.train("SOLVER.ON_NONFINITE", "skip") == 0
    records = read_journal(poisoned.output)
    assert [record["iteration"] for record in records] == [*range(MAX_ITER)]
    assert [record.get("event") for record in records] == [None, "skip", None, "skip", None]
    assert all(torch.isfinite(v).all() for v in final_state(poisoned.output)["model"].values())
    assert len(boxes(poisoned)) == 2
    assert "first in input of (model)" in capsys.readouterr().out


def test_skipping_ends_after_some_in_a_row(poisoned, capsys, monkeypatch):
    monkeypatch.setattr(nonfinite, "IN_A_ROW", 2)
    monkeypatch.setattr("d2ctx.recovery.blackbox.BOXES", 2)
    poisoned.poison(0, 2, 3)
    assert poisoned.train("SOLVER.ON_NONFINITE", "skip") == 2
    assert "error: 2 updates in a row were left out; iteration 3" in capsys.readouterr().err
    assert [path.stem for path in boxes(poisoned)] == ["step_00000000", "step_00000002"]


def test_rewind_goes_back_and_on_with_other_data(poisoned, capsys):
    poisoned.poison(3, 4)
    opts = ("SOLVER.ON_NONFINITE", "rewind", "SOLVER.CHECKPOINT_PERIOD", 2)
    assert poisoned.train(*opts) == 0
    assert "going back to the last checkpoint, on with other data" in capsys.readouterr().out
    records = read_journal(poisoned.output)
    assert [record["iteration"] for record in records] == [0, 1, 2, 2, 3, 4]
    assert (records[2]["event"], records[2]["from"]) == ("rewind", 3)
    state = final_state(poisoned.output)["trainer"]
    assert state["recovery"]["rewinds"] == state["recovery"]["data"]["detours"] == 1
    assert state["recovery"]["data"]["batches"] == MAX_ITER
    assert state["hooks"]["LRScheduler"]["last_epoch"] == MAX_ITER


def test_going_back_ends_after_some_times(poisoned, capsys, monkeypatch):
    monkeypatch.setattr(nonfinite, "REWINDS", 0)
    poisoned.poison(1)
    opts = ("SOLVER.ON_NONFINITE", "rewind", "SOLVER.CHECKPOINT_PERIOD", 1)
    assert poisoned.train(*opts) == 2
    assert "error: training went back 0 times; iteration 1:" in capsys.readouterr().err


def test_there_must_be_something_to_go_back_to(poisoned, capsys):
    poisoned.poison(1)
    assert poisoned.train("SOLVER.ON_NONFINITE", "rewind") == 2
    assert "there is no checkpoint to go back to" in capsys.readouterr().err


def test_a_rate_that_is_too_large_is_found_in_the_model(poisoned, capsys):
    opts = (
        "SOLVER.BASE_LR",
        1e30,
        "SOLVER.WARMUP_ITERS",
        0,
        "SOLVER.CLIP_GRADIENTS.ENABLED",
        "False",
    )
    assert poisoned.train(*opts) == 2
    (box,) = boxes(poisoned)
    found = read_box(box)["first"]
    assert found["module"].startswith("backbone.")
    assert f"first in {found['kind']} of {found['module']}" in capsys.readouterr().err
    assert replay.main([str(box)]) == 0
    out = capsys.readouterr().out
    assert f"first {found['kind']} that is not finite: {found['module']}" in out
    assert any(
        line.startswith("  > ") and line.endswith(found["module"]) for line in out.splitlines()
    )


# ---- replay ----------------------------------------------------------------------------------
def test_what_does_not_happen_again_is_told():
    found = {"first": None, "largest": {"a": 1.0, "b": 7.5}}
    (line,) = replay._now(found)
    assert line.startswith("not reproduced")
    assert line.endswith("7.5, is of b")


def test_the_neighbours_of_a_module_are_in_order():
    table = {f"m{i}": float(i) for i in range(20)}
    lines = replay._around(table, "m10")
    assert [line.split()[-1] for line in lines] == [f"m{i}" for i in range(6, 15)]
    assert [line[2] for line in lines] == list("    >    ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; name a step_"),
        ({"model": {"w": torch.zeros(1)}}, "is no record of a dropped update"),
    ],
)
def test_another_file_is_refused(tmp_path, capsys, content, message):
    path = tmp_path / "a.pt"
    if content:
        torch.save(content, path)
    assert replay.main([str(path)]) == 2
    assert message in capsys.readouterr().err


# ---- batches ---------------------------------------------------------------------------------
def same(a, b) -> bool:
    if isinstance(a, Instances):
        return a.image_size == b.image_size and same(a.get_fields(), b.get_fields())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if hasattr(a, "polygons"):
        return same(a.polygons, b.polygons)
    a, b = getattr(a, "tensor", a), getattr(b, "tensor", b)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_batch_survives_a_file_without_code(tmp_path):
    batch = tiny.batch()
    truth = batch[0]["instances"]
    truth.gt_masks = PolygonMasks(
        [[np.array([0.0, 0, 4, 0, 4, 4])], [np.array([1.0, 1, 2, 1, 2, 2])]]
    )
    truth.gt_keypoints = Keypoints(torch.ones(2, 3, 3))
    truth.rotated = RotatedBoxes(torch.ones(2, 5))
    batch[0] |= {"file_name": "a.jpg", "height": 4, "score": np.float64(2.0), "none": None}
    torch.save(to_plain(batch), tmp_path / "a.pt")
    back = from_plain(torch.load(tmp_path / "a.pt", weights_only=True))
    assert same(batch, back)
    kinds = {type(value) for value in back[0]["instances"].get_fields().values()}
    assert kinds == {Boxes, torch.Tensor, PolygonMasks, Keypoints, RotatedBoxes}
    assert isinstance(back[1]["instances"].gt_masks, BitMasks)


def test_what_cannot_be_kept_is_named():
    plain = to_plain({"a": [object()]})
    assert plain == {"a": [{"__kind__": "lost", "class": "object"}]}
    assert from_plain(plain) == {"a": [None]}
