"""`segtrain resume RUN --prove K`: the journal of a run against its updates made again."""

import json
import math
import os
import shutil
import signal

import pytest
import torch
import yaml

from segtrain.cli import main
from segtrain.errors import Interrupted, UserError
from segtrain.train.prove import _gap, prove
from segtrain.train.start import Parts, resume, train
from tests.segtrain.test_nonfinite import Poisoned
from tests.segtrain.train_toys import IMAGES, ToyModel, build, config, feed

OPTIONS = {"iters": 12, "checkpoint_every": 4, "keep": 9, "ema_decay": 0.5, "log_every": 3}


@pytest.fixture
def run(tmp_path):
    train(config(tmp_path / "run", **OPTIONS), build=build(norm=True))
    return tmp_path / "run"


def proven(folder, count, **keywords):
    return prove(folder, count, build=build(norm=True), **keywords)


def everything(folder):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def edited(folder, change):
    """Change the records of the journal."""
    path = folder / "log.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        change(record)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_exact_and_nothing_is_changed(run):
    before = everything(run)
    proof = proven(run, 4)
    assert everything(run) == before
    assert sorted(path.name for path in run.parent.iterdir()) == ["run"]
    assert (proof.checkpoint, proof.first, proof.last) == ("step_00000008.pt", 9, 12)
    assert proof.differs is None
    assert proof.notes == []
    assert proof.tolerance == 0.0
    counts = {row.what: row.count for row in proof.rows}
    assert counts == {
        **{"loss_seg": 4, "loss_aux": 4, "grad_norm": 4, "skipped": 4},
        **{"lr": 2, "state": 1},  # lines after updates 9 and 12; the checkpoint of the end
    }
    assert all(row.largest == 0.0 for row in proof.rows)
    lines = proof.text().splitlines()
    assert lines[0] == "updates 9 to 12 again from step_00000008.pt"
    assert lines[-1] == "exact"


@pytest.mark.parametrize(("count", "name"), [(1, 8), (4, 8), (5, 4), (8, 4)])
def test_the_newest_checkpoint_with_enough_behind_it(run, count, name):
    proof = proven(run, count)
    assert proof.checkpoint == f"step_{name:08d}.pt"
    assert (proof.first, proof.last) == (name + 1, name + count)
    assert proof.differs is None


def test_states_on_the_way_are_compared(run):
    states = [row for row in proven(run, 8).rows if row.what == "state"]
    assert [row.count for row in states] == [2]  # of updates 8 and 12


def test_fewer_updates_than_asked_for_are_said(run):
    proof = proven(run, 9)
    assert (proof.first, proof.last) == (9, 12)
    assert proof.notes == [
        "no checkpoint has 9 updates after it in the journal, which ends with update 12; "
        "4 updates instead"
    ]
    assert proof.differs is None


def test_nothing_after_the_only_checkpoint(tmp_path):
    train(config(tmp_path, iters=2), build=build())
    with pytest.raises(UserError, match=r"no checkpoint has an update after it .*train.keep: 2"):
        prove(tmp_path, 3, build=build())
    with pytest.raises(UserError, match="expected at least one update"):
        prove(tmp_path, 0, build=build())


def test_a_number_that_differs_is_named(run):
    def change(record):
        if record["event"] == "train" and record["step"] == 12:
            losses = record["updates"]["loss_seg"]
            place = 10 - record["updates"]["first"]
            losses[place] = math.nextafter(losses[place], 9)  # the last bit of a float64

    edited(run, change)
    proof = proven(run, 4)
    assert proof.differs.startswith("update 10: loss_seg ")
    (row,) = [row for row in proof.rows if row.what == "loss_seg"]
    assert 0 < row.largest < 1e-15
    assert row.update == 10
    assert "not the same (tolerance 0): update 10: loss_seg" in proof.text()
    assert proven(run, 4, tolerance=1e-12).differs is None
    assert proven(run, 4, tolerance=1e-12).text().endswith("the same within 1e-12")


@pytest.mark.parametrize("what", ["lr", "grad_norm", "missing"])
def test_every_kind_of_number_counts(run, what):
    def change(record):
        if record["event"] == "train" and record["step"] == 12:
            if what == "lr":
                record["lr"] *= 1.5
            elif what == "grad_norm":
                record["updates"]["grad_norm"][-1] = None
            else:
                del record["updates"]["loss_aux"]

    edited(run, change)
    proof = proven(run, 4)
    name = "loss_aux" if what == "missing" else what
    assert f"{name} " in proof.differs
    largest = {row.what: row.largest for row in proof.rows}[name]
    assert largest == (pytest.approx(1 / 3) if what == "lr" else math.inf)


@pytest.mark.parametrize("section", ["model", "optimizer", "average", "generators"])
def test_a_state_that_differs_is_named(run, section):
    """The losses of these updates are the same; what the end looks like is not."""
    path = run / "checkpoints/last.pt"
    state = torch.load(path, weights_only=True)
    if section == "optimizer":
        state[section]["state"][0]["momentum_buffer"][0] += 1e-3
    elif section == "generators":
        state[section][0]["torch"][9] ^= 1
    else:
        list(state[section].values())[-1].view(-1)[0] += 1e-3
    torch.save(state, path)
    assert proven(run, 4).differs == "update 12: state"


def test_other_generators_are_noticed(run):
    """Dropout draws other numbers: what is proven is not only the order of the data."""
    path = run / "checkpoints/step_00000008.pt"
    state = torch.load(path, weights_only=True)
    state["generators"][0] = state["generators"][0] | {"torch": torch.get_rng_state()}
    torch.save(state, path)
    proof = proven(run, 4)
    assert proof.differs.startswith("update 9: ")


def test_another_environment_is_told_where_something_differs(run):
    path = run / "environment.txt"
    path.write_text(path.read_text().replace(f"torch: {torch.__version__}", "torch: 1.0"))
    assert proven(run, 4).notes == []
    edited(run, lambda record: record.get("updates", {}).pop("grad_norm", None))
    assert proven(run, 4).notes == [f"torch: 1.0 -> {torch.__version__}"]


def test_a_damaged_checkpoint_is_left_out(run):
    path = run / "checkpoints/step_00000008.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    proof = proven(run, 4)
    assert proof.checkpoint == "step_00000004.pt"
    assert "step_00000008.pt cannot be read (wrong check sum" in proof.notes[0]


def test_another_number_of_processes_is_refused(run):
    for path in (run / "checkpoints").glob("*.pt"):
        state = torch.load(path, weights_only=True)
        torch.save({**state, "generators": state["generators"] * 2}, path)
    with pytest.raises(UserError, match="is of 2 processes, this is 1; .*--nproc-per-node 2"):
        proven(run, 4)


def test_a_changed_configuration_is_refused(run):
    path = run / "config.yaml"
    content = yaml.safe_load(path.read_text())
    content["optim"]["lr"] = 0.7
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="was changed since the checkpoint"):
        proven(run, 4)


def test_every_update_is_in_the_journal_once_though_it_was_stopped(tmp_path):
    """The lines come every 5 updates, the signal after 7: the line of saving has 6 and 7."""
    options = {"iters": 12, "log_every": 5, "keep": 9, "checkpoint_every": 4}
    stopping = config(tmp_path, **options)

    class Stops(ToyModel):
        calls = 0

        def forward(self, image):
            self.calls += self.training
            if self.calls == 7 and self.training:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().forward(image)

    with pytest.raises(Interrupted, match="after update 7"):
        train(stopping, build=lambda *_: Parts(model=Stops(), feed=feed(stopping), images=IMAGES))
    resume(tmp_path, build=build())
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    spans = [(r["updates"]["first"], r["updates"]["count"]) for r in records if "updates" in r]
    numbers = [n for first, count in spans for n in range(first, first + count)]
    assert numbers == list(range(1, 13))
    assert prove(tmp_path, 8, build=build()).differs is None


def test_skipped_updates_are_skipped_again(tmp_path):
    run = config(tmp_path, **OPTIONS, on_nonfinite="skip")
    images = Poisoned((3, 1))  # position 37: update 10

    def parts(*_):
        return Parts(model=ToyModel(norm=True), feed=feed(run, images=images), images=IMAGES)

    train(run, build=parts)
    before = everything(tmp_path)
    proof = prove(tmp_path, 4, build=parts)
    assert proof.differs is None
    assert everything(tmp_path) == before  # no black box either
    calm = proven(tmp_path, 4)
    assert calm.differs.startswith("update 10: grad_norm nan -> 0.")
    assert ", skipped 1 -> 0" in calm.differs or "loss_seg nan -> " in calm.differs


def test_the_order_after_a_rewind_is_the_one_that_was_gone_on_with(tmp_path):
    run = config(tmp_path, **OPTIONS, on_nonfinite="rewind")
    images = Poisoned((3, 1))

    def parts(*_):
        return Parts(model=ToyModel(norm=True), feed=feed(run, images=images), images=IMAGES)

    train(run, build=parts)
    proof = prove(tmp_path, 4, build=parts)
    assert proof.checkpoint == "step_00000008.pt"
    assert proof.differs is None


def test_a_read_only_run_can_be_proven(run, tmp_path):
    """No lock is taken: the copy has no room for one."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / ".lock").unlink()
    assert proven(copy, 4).differs is None
    assert not (copy / ".lock").exists()


def test_command_line(run, capsys, monkeypatch):
    monkeypatch.setattr("segtrain.train.parts.build_parts", build(norm=True))
    assert main(["resume", str(run), "--prove", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "exact"
    edited(run, lambda record: record.get("updates", {}).pop("grad_norm", None))
    assert main(["resume", str(run), "--prove", "2", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["differs"].startswith("update 9: grad_norm none -> ")
    assert main(["resume", str(run), "--tolerance", "1"]) == 2
    assert "--tolerance is of --prove" in capsys.readouterr().err
    assert main(["resume", str(run / "nothing"), "--prove", "2"]) == 2
    assert "is no run, it has no config.yaml" in capsys.readouterr().err


def test_gaps():
    assert _gap(1.0, 1.0) == 0.0
    assert _gap(math.nan, math.nan) == 0.0
    assert _gap(1.0, 2.0) == 0.5
    assert _gap(1.0, None) == math.inf
    assert _gap(math.nan, 1.0) == math.inf
    nest = {"a": [torch.tensor([1.0, 4.0])], "b": (1, "x")}
    assert _gap(nest, {"a": [torch.tensor([1.0, 5.0])], "b": (1, "x")}) == pytest.approx(0.2)
    assert _gap(nest, {"a": [torch.tensor([1.0, 4.0])], "b": (1, "y")}) == math.inf
    assert _gap(torch.tensor([1]), torch.tensor([2])) == math.inf
    assert _gap(torch.ones(2), torch.ones(3)) == math.inf
    assert _gap([1], [1, 2]) == math.inf
    assert _gap({"a": 1}, {"b": 1}) == math.inf
