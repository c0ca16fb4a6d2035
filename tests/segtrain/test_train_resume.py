import errno
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from segtrain.cli import main
from segtrain.errors import Interrupted, UserError
from segtrain.files import run_lock
from segtrain.optim import build_optimizer
from segtrain.train.checkpoint import load_checkpoint, newest_checkpoint
from segtrain.train.journal import read_journal
from segtrain.train.start import Parts, resume, train
from segtrain.train.state import TrainingState
from tests.segtrain.train_toys import (
    IMAGES,
    ToyImages,
    ToyModel,
    assert_same,
    build,
    config,
    feed,
    weights,
)


class StopsAt(ToyImages):
    """Sends this process a signal while it loads the given image of the stream."""

    def __init__(self, key, number=signal.SIGTERM):
        self.key, self.number, self.sent = key, number, False

    def __getitem__(self, key):
        if key == self.key and not self.sent:
            self.sent = True
            os.kill(os.getpid(), self.number)
        return super().__getitem__(key)


def stopped(run, key, *, number=signal.SIGTERM, **model):
    """Train until the signal."""
    images = StopsAt(key, number)

    def parts(*_):
        return Parts(model=ToyModel(**model), feed=feed(run, images=images), images=IMAGES)

    with pytest.raises(Interrupted) as caught:
        train(run, build=parts)
    return str(caught.value)


def whole_state(folder):
    state = torch.load(folder / "checkpoints/last.pt", weights_only=True)
    del state["config"]  # names the folder
    return state


def assert_equal_trees(a, b, path="state"):
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            assert_equal_trees(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal_trees(x, y, f"{path}.{index}")
    else:
        assert a == b, path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ema_decay": 0.9},
        {"micro_batch": 1, "ema_decay": 0.9},
        {"optim": {"name": "adamw", "lr": 1e-2}, "eval_every": 5, "precision": "bf16"},
        {"schedule": {"name": "cosine", "warmup_iters": 15}, "channels_last": True},
    ],
    ids=["sgd", "average", "accumulation", "adamw", "cosine"],
)
def test_20_updates_are_10_and_10_resumed(tmp_path, options):
    options = {"iters": 20, **options}
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    train(config(straight, **options), build=build(norm=True))
    # Update 10 takes positions 36..39: epoch 3, images 0..3.
    message = stopped(config(halves, **options), (3, 1), norm=True)
    assert message == f"saved after update 10; go on with: segtrain resume {halves}"
    assert torch.load(halves / "checkpoints/last.pt", weights_only=True)["step"] == 10
    results = resume(halves, build=build(norm=True))
    assert_equal_trees(whole_state(straight), whole_state(halves))
    assert_same(weights(straight, "best"), weights(halves, "best"))
    assert results == json.loads((straight / "results.json").read_text())


def test_resume_is_exact_with_two_workers(tmp_path):
    straight, halves = (
        config(tmp_path / name, iters=8, micro_batch=2, ema_decay=0.5, workers=2)
        for name in ("straight", "halves")
    )
    train(straight, build=build())

    class Stopping(ToyModel):
        calls = 0

        def forward(self, image):
            self.calls += 1
            if self.calls == 2 * 4:  # update 4
                os.kill(os.getpid(), signal.SIGTERM)
            return super().forward(image)

    with pytest.raises(Interrupted, match="saved after update 4;"):
        train(halves, build=lambda *_: Parts(model=Stopping(), feed=feed(halves), images=IMAGES))
    resume(tmp_path / "halves", build=build())
    assert_equal_trees(whole_state(tmp_path / "straight"), whole_state(tmp_path / "halves"))


def test_scale_of_the_loss_is_restored(tmp_path):
    """Only fp16 scales, on a GPU; the scaler itself works anywhere."""

    def state(scale):
        model = ToyModel()
        optimizer = build_optimizer(model, config(tmp_path).optim)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return TrainingState(model=model, forward=model, optimizer=optimizer, scaler=scaler)

    restored = state(2.0)
    restored.load_state_dict(state(8.0).state_dict())
    assert restored.scaler.get_scale() == 8.0


def test_dropout_would_differ_without_the_generators(tmp_path):
    """What the tests above compare depends on the saved generators."""
    run = config(tmp_path / "a", iters=8)
    train(run, build=build(dropout=0.5))
    stopped(config(tmp_path / "b", iters=8), (1, 1), dropout=0.5)
    path = tmp_path / "b/checkpoints/last.pt"
    state = torch.load(path, weights_only=True)
    state["generators"] = [*state["generators"], *state["generators"]]  # as of two processes
    torch.save(state, path)
    resume(tmp_path / "b", build=build(dropout=0.5))
    assert not torch.equal(
        weights(tmp_path / "a")["stem.weight"], weights(tmp_path / "b")["stem.weight"]
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_the_update_and_restores_the_handlers(tmp_path, number):
    before = signal.getsignal(number)
    message = stopped(config(tmp_path), (0, 0), number=number)
    assert message.startswith("saved after update 1;")
    assert signal.getsignal(number) is before
    last = list(read_journal(tmp_path / "log.jsonl"))[-1]
    assert (last["event"], last["step"], last["signal"]) == ("stop", 1, number.name)


def test_signal_during_evaluation_gives_it_up_and_resume_catches_up(tmp_path):
    run = config(tmp_path, iters=4, eval_every=2)
    calm = feed(run)
    asked = []

    def evaluate(model):
        asked.append(model)
        if len(asked) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return calm.evaluate(model)

    hasty = type(calm)(batches=calm.batches, evaluate=evaluate)
    with pytest.raises(Interrupted, match="stopped while evaluating; go on with: segtrain resume"):
        train(run, build=lambda *_: Parts(model=ToyModel(), feed=hasty, images=IMAGES))
    resume(tmp_path, build=build())
    records = [r for r in read_journal(tmp_path / "log.jsonl") if r["event"] == "evaluate"]
    assert [record["step"] for record in records] == [2, 4]


def test_journal_has_every_update_once_after_a_crash(tmp_path):
    run = config(tmp_path, iters=6, checkpoint_every=2)

    class Broken(ToyImages):
        def __getitem__(self, key):
            if key == (1, 0):  # update 4
                raise OSError("disk gone")
            return super().__getitem__(key)

    parts = Parts(model=ToyModel(), feed=feed(run, images=Broken()), images=IMAGES)
    with pytest.raises(OSError, match="disk gone"):
        train(run, build=lambda *_: parts)
    resume(tmp_path, build=build())
    records = list(read_journal(tmp_path / "log.jsonl"))
    assert [r["step"] for r in records if r["event"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [r["event"] for r in records if r["event"] in ("start", "resume")] == ["start", "resume"]


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    results = train(config(tmp_path), build=build())
    before = whole_state(tmp_path)
    assert resume(tmp_path, build=build()) == results
    assert_equal_trees(before, whole_state(tmp_path))


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    train(config(tmp_path), build=build())
    text = (
        f"{tmp_path} already holds a run; go on with it: segtrain resume {tmp_path}, or write out"
    )
    with pytest.raises(UserError, match=text):
        train(config(tmp_path), build=build())


def test_a_run_that_died_before_its_first_checkpoint_may_start_again(tmp_path):
    def fails(*_):
        raise UserError("no such data")

    with pytest.raises(UserError, match="no such data"):
        train(config(tmp_path), build=fails)
    (tmp_path / "results.json").write_text('{"step": 4, "best": {"step": 4, "miou": 1.0}}')
    (tmp_path / "log.jsonl").write_text('{"event": "train", "step": 3}\n')
    assert train(config(tmp_path), build=build())["best"]["miou"] < 1
    assert len(list(read_journal(tmp_path / "log.jsonl"))) == 7  # start, 4 updates, save, evaluate


def test_a_folder_in_use_is_refused(tmp_path):
    train(config(tmp_path), build=build())
    code = (
        "import sys, time; from pathlib import Path; from segtrain.files import run_lock\n"
        f"with run_lock(Path({str(tmp_path)!r})): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == b"held\n"
            with pytest.raises(UserError, match=f"is in use by process {other.pid}"):
                resume(tmp_path, build=build())
        finally:
            other.kill()
    with run_lock(tmp_path):
        pass


def edit(folder, **changes):
    path = folder / "config.yaml"
    content = yaml.safe_load(path.read_text())
    for key, value in changes.items():
        section, _, name = key.partition("__")
        content[section][name] = value
    path.write_text(yaml.safe_dump(content))


def test_a_changed_configuration_is_refused_with_a_diff(tmp_path):
    train(config(tmp_path), build=build())
    edit(tmp_path, train__iters=8, optim__lr=0.5, train__log_every=5)
    with pytest.raises(UserError) as caught:
        resume(tmp_path, build=build())
    head, *lines = str(caught.value).splitlines()
    assert "config.yaml was changed since the checkpoint; put it back, or start a new run" in head
    assert lines == ["  optim.lr: 0.1 -> 0.5", "  train.iters: 4 -> 8"]


def test_what_changes_no_number_may_be_changed(tmp_path):
    stopped(config(tmp_path), (0, 0))
    edit(tmp_path, train__log_every=5, data__root="elsewhere", data__workers=0, train__keep=3)
    assert resume(tmp_path, build=build())["step"] == 4


def test_no_run_is_named(tmp_path, capsys):
    assert main(["resume", str(tmp_path / "nothing")]) == 2
    assert "is no run, it has no config.yaml; name the output" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_checkpoint_says_how_to_start_again(tmp_path):
    train(config(tmp_path), build=build())
    for file in (tmp_path / "checkpoints").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="has no checkpoint to go on from; start again: segtrain"):
        load_checkpoint(tmp_path)


def cut(content):
    return content[:100]


def flipped(content):
    """One bit of a weight, which torch alone would not notice."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [cut, flipped, lambda content: b"", lambda content: b"x" * 999])
def test_an_older_checkpoint_takes_over_with_a_line(tmp_path, capsys, damage):
    options = {"iters": 6, "checkpoint_every": 2, "keep": 3, "eval_every": 2, "ema_decay": 0.5}
    for name in ("straight", "damaged"):
        train(config(tmp_path / name, **options), build=build(norm=True))
    folder = tmp_path / "damaged"
    last = folder / "checkpoints/last.pt"
    last.write_bytes(damage(last.read_bytes()))
    capsys.readouterr()
    resume(folder, build=build(norm=True))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "cannot be read" in line]
    assert line.startswith(f"{last} cannot be read (")
    assert line.endswith("); going on from step_00000004.pt of update 4 instead")
    assert_equal_trees(whole_state(tmp_path / "straight"), whole_state(folder))
    results = [
        json.loads((tmp_path / n / "results.json").read_text()) for n in ("straight", "damaged")
    ]
    assert results[0] == results[1]
    steps = [r["step"] for r in read_journal(folder / "log.jsonl") if r["event"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_two_damaged_checkpoints_and_then_none(tmp_path):
    train(config(tmp_path, iters=6, checkpoint_every=2, keep=3), build=build())
    place, notes = tmp_path / "checkpoints", []
    for name in ("last.pt", "step_00000004.pt"):
        (place / name).write_bytes(cut((place / name).read_bytes()))
    assert load_checkpoint(tmp_path, notes=notes)["step"] == 2
    (note,) = notes
    assert note.count("cannot be read") == 2
    (place / "step_00000002.pt").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"last.pt cannot .* there is no older one, start again: seg"
    ):
        load_checkpoint(tmp_path)
    assert newest_checkpoint(tmp_path).name == "last.pt"


def test_weights_beside_a_checkpoint_that_are_damaged_are_written_again(tmp_path):
    train(config(tmp_path), build=build())
    path = tmp_path / "checkpoints/last.safetensors"
    path.write_bytes(cut(path.read_bytes()))
    resume(tmp_path, build=build())
    assert_same(load_file(path), weights(tmp_path))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    train(config(tmp_path), build=build())
    torch.save({"version": 1, "evil": os.system}, tmp_path / "checkpoints/last.pt")
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint(tmp_path)


def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    run = config(tmp_path, iters=4, checkpoint_every=2, keep=2)
    save, calls = torch.save, []

    def half(content, file):
        calls.append(file)
        save(content, file)
        if len(calls) == 2:
            file.truncate(100)
            raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        train(run, build=build())
    assert load_checkpoint(tmp_path)["step"] == 2
    assert not list((tmp_path / "checkpoints").glob("*partial*"))


def test_a_full_disk_is_said_with_what_is_needed_and_what_is_there(tmp_path, monkeypatch, capsys):
    """The second checkpoint finds no room: one line, the first one stays, no piece is left."""
    run = config(tmp_path, iters=4, checkpoint_every=2, keep=2)
    save, calls = torch.save, []

    def full(content, file):
        calls.append(file)
        if len(calls) == 2:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(content, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError) as caught:
        train(run, build=build())
    said = str(caught.value)
    assert "\n" not in said
    assert "last.pt: No space left on device; make room there" in said
    assert re.search(r"\(a checkpoint takes 0\.0 MB, [\d.]+ MB are free there\)$", said)
    assert load_checkpoint(tmp_path)["step"] == 2
    assert not list(tmp_path.rglob("*partial*"))
    monkeypatch.undo()
    assert resume(tmp_path, build=build())["step"] == 4


LIMITED = """
import resource, sys
from pathlib import Path
from segtrain.cli import main
from tests.segtrain.train_toys import build, config
import segtrain.train.parts
segtrain.train.parts.build_parts = build()
resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))
sys.exit(main(["resume", sys.argv[1]]))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limits of files")
def test_a_limit_of_the_system_is_said_as_well(tmp_path):
    """A real one, in a process of its own: files may not grow beyond 12 kB."""
    train(config(tmp_path, iters=6, checkpoint_every=3, keep=2), build=build())
    for name in ("last.pt", "last.safetensors"):  # as if stopped after update 3
        (tmp_path / "checkpoints" / name).unlink()
    before = (tmp_path / "checkpoints/step_00000003.pt").read_bytes()
    assert len(before) > 12_000
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True
    )
    assert ended.returncode == 2, ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("segtrain: error: cannot write ")
    assert "last.pt: File too large; make room there" in last
    assert (tmp_path / "checkpoints/step_00000003.pt").read_bytes() == before
    assert not list(tmp_path.rglob("*partial*"))
    assert load_checkpoint(tmp_path)["step"] == 3
