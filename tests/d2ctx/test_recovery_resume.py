"""A run that was killed goes on to the same bits, and `--prove` tells whether one does."""

import json
import logging
from pathlib import Path

import pytest
import torch

from d2ctx.config import load_config
from d2ctx.recovery.hooks import Checkpoints
from d2ctx.recovery.journal import Journal, read_journal
from d2ctx.recovery.prove import differences
from d2ctx.recovery.rng import generator_state
from d2ctx.trainer import Trainer
from tests.d2ctx.launch import MAX_ITER, Launch
from tests.d2ctx.test_train_net import CrashError, final_state
from tests.segtrain.test_train_resume import assert_equal_trees

# Scales to draw from; no evaluation.
OPTS = ("INPUT.MIN_SIZE_TRAIN", "(48, 56, 64)", "SEED", 3, "DATASETS.TEST", "()")
EVERY_TWO = (*OPTS, "SOLVER.CHECKPOINT_PERIOD", 2)


def crash(launch: Launch, monkeypatch, iteration: int, *opts: object) -> None:
    """A run that ends in the middle of an iteration."""
    with monkeypatch.context() as patch:
        run_step = Trainer.run_step

        def step(trainer: Trainer) -> None:
            if trainer.iter == iteration:
                raise CrashError
            run_step(trainer)

        patch.setattr(Trainer, "run_step", step)
        with pytest.raises(CrashError):
            launch.main(*opts)


def tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [tensor for part in parts for tensor in tensors(part)]


# ---- the same bits ---------------------------------------------------------------------------
def goes_on_to_the_same_bits(launch: Launch, whole: Path, *opts: object) -> None:
    assert launch.main(*opts, "OUTPUT_DIR", whole) == 0
    assert launch.main("--resume", *opts) == 0
    expected, found = final_state(whole), final_state(launch.output)
    # Weights, optimizer, random generators: whatever a checkpoint holds.
    assert len(tensors(found)) > 300
    assert all(map(torch.equal, tensors(found), tensors(expected)))
    assert found["trainer"]["recovery"]["data"] == expected["trainer"]["recovery"]["data"]
    assert read_journal(launch.output) == read_journal(whole)
    assert [record["iteration"] for record in read_journal(whole)] == [*range(MAX_ITER)]


def test_a_killed_run_goes_on_to_the_same_bits(launch, tmp_path, monkeypatch):
    """Evaluations, between checkpoint and crash and elsewhere, leave no trace."""
    opts = (*EVERY_TWO, "DATASETS.TEST", "('toy_val',)", "TEST.EVAL_PERIOD", 2)
    crash(launch, monkeypatch, 3, *opts)
    goes_on_to_the_same_bits(launch, tmp_path / "whole", *opts)


def test_with_workers_and_a_broken_checkpoint_it_does_so_too(launch, tmp_path, monkeypatch):
    opts = (*OPTS, "DATALOADER.NUM_WORKERS", 2, "SOLVER.OPTIMIZER", "AdamW")
    crash(launch, monkeypatch, 3, *opts, "SOLVER.CHECKPOINT_PERIOD", 1)
    newest = launch.output / "model_0000002.pth"
    newest.write_bytes(newest.read_bytes()[:-5000])
    goes_on_to_the_same_bits(launch, tmp_path / "whole", *opts, "SOLVER.CHECKPOINT_PERIOD", 1)


@pytest.mark.parametrize("killed", ["before it was written", "before it was named", "half of it"])
def test_the_final_checkpoint_is_all_that_is_left_to_do(launch, killed):
    """A run that was killed after its last numbered checkpoint; its evaluation is left as well."""
    opts = (*OPTS[:-2], "SOLVER.CHECKPOINT_PERIOD", MAX_ITER)
    assert launch.main(*opts) == 0
    final, results = launch.output / "model_final.pth", launch.results()
    expected, journal = final_state(launch.output), read_journal(launch.output)
    if killed == "half of it":
        final.write_bytes(final.read_bytes()[:-5000])
    else:
        (launch.output / "last_checkpoint").write_text(f"model_{MAX_ITER - 1:07d}.pth")
    if killed == "before it was written":
        final.unlink()
    (launch.output / "results.json").unlink()
    assert launch.main("--resume", *opts) == 0
    assert_equal_trees(final_state(launch.output), expected)
    assert (launch.output / "last_checkpoint").read_text() == final.name
    assert launch.results() == results
    assert read_journal(launch.output) == journal


@pytest.fixture
def trainer(launch):
    """A trainer that did nothing, with the state of one."""
    launch.output.mkdir()
    trainer = Trainer(load_config(str(launch.config)))
    trainer.checkpoints.generators = [generator_state()]
    return trainer


def test_a_state_that_fits_is_restored_without_a_word(trainer, caplog):
    state = trainer.state_dict()
    before = generator_state()["torch"]
    torch.rand(1)
    with caplog.at_level(logging.WARNING, "d2ctx"):
        trainer.load_state_dict(state)
        trainer._restore_generators()
    assert torch.equal(generator_state()["torch"], before)
    assert not caplog.records


@pytest.mark.parametrize("lost", [{}, {"recovery": {"generators": [], "data": None}}])
def test_an_order_that_the_checkpoint_does_not_know_is_told(trainer, caplog, lost):
    state = {key: value for key, value in trainer.state_dict().items() if key != "recovery"}
    with caplog.at_level(logging.WARNING, "d2ctx"):
        trainer.load_state_dict({**state, **lost})
    assert "the order of the data is not restored" in caplog.text


def test_a_loader_of_the_users_own_is_told(trainer, caplog):
    state = trainer.state_dict()
    trainer.data_loader = [[]]
    assert trainer.state_dict()["recovery"]["data"] is None
    with caplog.at_level(logging.WARNING, "d2ctx"):
        trainer.load_state_dict(state)
    assert "the order of the data is not restored" in caplog.text


def test_another_number_of_processes_is_told(trainer, caplog):
    trainer.checkpoints.generators *= 2
    trainer.load_state_dict(trainer.state_dict())
    torch.rand(1)
    before = generator_state()["torch"]
    with caplog.at_level(logging.WARNING, "d2ctx"):
        trainer._restore_generators()
    assert "the checkpoint is of 2 processes, these are 1" in caplog.text
    assert torch.equal(generator_state()["torch"], before)


# ---- the journal -----------------------------------------------------------------------------
def test_a_journal_is_cut_back_and_survives_a_crash(tmp_path):
    journal = Journal(tmp_path)
    for iteration in range(25):
        journal.write({"iteration": iteration, "losses": {"a": float("nan")}})
    assert len(read_journal(tmp_path)) == 20  # the others wait in memory
    journal.flush()
    with journal.path.open("a") as file:
        file.write('{"iteration": 2')
    assert len(read_journal(tmp_path)) == 25
    assert read_journal(tmp_path)[0] == {"iteration": 0, "losses": {"a": "nan"}}
    journal.cut_back(3)
    assert [record["iteration"] for record in read_journal(tmp_path)] == [0, 1, 2]


# ---- proof -----------------------------------------------------------------------------------
def content(folder: Path) -> dict[Path, tuple]:
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and path.name != "log.txt"
    }


@pytest.fixture
def trained(launch, monkeypatch):
    assert launch.main(*EVERY_TWO) == 0
    return launch


def prove(launch: Launch, updates: int) -> int:
    return launch.main("--resume", "--prove", updates, *EVERY_TWO)


def test_a_run_is_proved_without_being_touched(trained, capsys):
    before = content(trained.output)
    assert prove(trained, 1) == 0
    assert "exact: 1 update from model_0000003.pth, up to iteration 4," in capsys.readouterr().out
    assert prove(trained, 2) == 0
    assert "exact: 2 updates from model_0000001.pth, up to iteration 3," in capsys.readouterr().out
    assert content(trained.output) == before


def test_what_differs_is_shown(trained, capsys):
    path = trained.output / "losses.jsonl"
    records = read_journal(trained.output)
    true = records[4]["losses"]["loss_cls"]
    records[4]["losses"]["loss_cls"] = true + 1e-7
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(SystemExit) as ended:
        prove(trained, 1)
    assert ended.value.code == 1
    assert f"iteration 4: loss_cls was {true + 1e-7}, is {true}" in capsys.readouterr().out


def test_too_long_a_proof_says_what_there_is(trained, capsys):
    assert prove(trained, 4) == 2
    err = capsys.readouterr().err
    assert "with 4 updates behind it in losses.jsonl, got at most 3; set --prove to that" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--prove", 2), "--prove needs --resume"),
        (("--resume", "--eval-only", "--prove", 2), "--prove needs --resume"),
        (("--resume", "--prove", 0), "--prove must be a number of updates from 1 on, got 0"),
    ],
)
def test_a_proof_of_nothing_is_refused(launch, capsys, args, message):
    assert launch.main(*args) == 2
    assert message in capsys.readouterr().err
    assert not launch.output.exists()


def test_every_number_counts():
    old = {"iteration": 4, "lr": [0.1], "losses": {"a": 1.0, "b": 2.0}}
    assert differences([old], [old]) == []
    assert differences([old], [{**old, "lr": [0.2]}]) == ["iteration 4: lr was [0.1], is [0.2]"]
    assert differences([old], [{**old, "losses": {"a": 1.0}}]) == [
        "iteration 4: b was 2.0, is None"
    ]
    assert len(differences([old], [])) == 4


def test_processes_save_together(monkeypatch):
    """The main one gathers the generators of all; a failure there ends all."""
    gathered = []
    monkeypatch.setattr("d2ctx.recovery.hooks.comm.gather", lambda s: gathered.append(s) or [])
    monkeypatch.setattr("d2ctx.recovery.hooks.comm.is_main_process", lambda: False)
    monkeypatch.setattr("d2ctx.recovery.hooks.comm.all_gather", lambda _: ["disk full", None])

    class Running:
        iter, max_iter = 1, 9

    hook = Checkpoints(2)
    hook.trainer = Running
    with pytest.raises(ValueError, match="disk full"):
        hook.after_step()
    assert len(gathered) == 1
