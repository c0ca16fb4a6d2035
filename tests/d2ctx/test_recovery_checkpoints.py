"""Checkpoints are whole or not there, whatever happens, and the newest that can be read is used."""

import errno
import logging
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from d2ctx import UserError, files
from d2ctx.recovery import checkpoints
from d2ctx.recovery.checkpoints import checkpoint_files, set_aside, to_resume_from, write_checkpoint
from d2ctx.recovery.journal import read_journal
from d2ctx.weights import SafeCheckpointer


class CrashError(BaseException):
    """What a power cut is to a program."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save(folder: Path, iteration: int, *, size: int = 4) -> None:
    content = {"model": {"w": torch.full((size,), float(iteration))}, "iteration": iteration}
    write_checkpoint(folder, f"model_{iteration:07d}.pth", content)


def resumed(folder: Path) -> int:
    """The iteration that a run would go on from."""
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(4))
    extra = SafeCheckpointer(model, str(folder)).resume_or_load("", resume=True)
    assert torch.equal(model.w.detach(), torch.full((4,), float(extra["iteration"])))
    return extra["iteration"]


# ---- writing ---------------------------------------------------------------------------------
def test_a_checkpoint_and_its_name(tmp_path):
    save(tmp_path, 3)
    save(tmp_path, 7)
    assert names(tmp_path) == ["last_checkpoint", "model_0000003.pth", "model_0000007.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000007.pth"
    assert resumed(tmp_path) == 7


@pytest.mark.parametrize("call", range(8))
def test_a_crash_at_any_step_leaves_a_checkpoint_that_can_be_read(tmp_path, monkeypatch, call):
    save(tmp_path, 3)
    calls = iter(range(100))

    def crashing(function):
        def wrapped(*args, **kwargs):
            if next(calls) == call:
                raise CrashError
            return function(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(Path, "unlink", lambda self, **_: None)  # the dead clean nothing up
    for module, name in ((torch, "save"), (os, "fsync"), (os, "replace")):
        monkeypatch.setattr(module, name, crashing(getattr(module, name)))
    try:
        save(tmp_path, 7)
    except CrashError:
        # save, fsync | replace, fsync (folder), fsync | replace, fsync (folder)
        assert resumed(tmp_path) == (7 if call >= 6 else 3)
    else:
        assert call == 7
    monkeypatch.undo()
    files.remove_partials(tmp_path)
    assert not [name for name in names(tmp_path) if "partial" in name]
    save(tmp_path, 9)
    assert resumed(tmp_path) == 9


def test_the_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(Path(b).name), replace(a, b))[1])
    save(tmp_path, 3)
    named = ["fsync", "last_checkpoint", "fsync"]
    assert done == ["fsync", "model_0000003.pth", "fsync", *named]


@contextmanager
def room_for(number: int):
    """Let files grow no larger than this, as on a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_without_room_the_old_checkpoint_stays_and_nothing_else(tmp_path):
    save(tmp_path, 3)
    with room_for(100_000), pytest.raises(UserError) as caught:
        save(tmp_path, 7, size=100_000)
    assert str(caught.value).replace(str(tmp_path), "RUN") == (
        "checkpoint RUN/model_0000007.pth could not be written (File too large); the ones before "
        "it are intact: make room, then go on with the same command and --resume"
    )
    assert names(tmp_path) == ["last_checkpoint", "model_0000003.pth"]
    assert resumed(tmp_path) == 3


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_what_the_system_says_is_passed_on(tmp_path, monkeypatch, code):
    save(tmp_path, 3)

    def refused(*_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refused)
        with pytest.raises(UserError, match=rf"could not be written \({os.strerror(code)}\)"):
            save(tmp_path, 7)
    assert names(tmp_path) == ["last_checkpoint", "model_0000003.pth"]


def test_a_mistake_of_the_program_is_no_matter_of_room(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("not about files")

    monkeypatch.setattr(checkpoints.torch, "save", broken)
    with pytest.raises(RuntimeError, match="not about files"):
        save(tmp_path, 3)


def test_a_run_without_room_ends_with_one_line_and_goes_on(launch, capsys):
    opts = ("SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.MAX_ITER", 3, "DATASETS.TEST", "()")
    with room_for(1_000_000):
        assert launch.main(*opts) == 2
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith(f"error: checkpoint {launch.output}/model_0000001.pth")
    assert "Traceback" not in out + err + (launch.output / "log.txt").read_text()
    assert not list(launch.output.glob("*.p*"))
    assert [record["iteration"] for record in read_journal(launch.output)] == [0, 1]
    assert launch.main("--resume", *opts) == 0
    assert resumed_iteration(launch.output) == 2


def resumed_iteration(folder: Path) -> int:
    return torch.load(to_resume_from(folder)[0], weights_only=True)["iteration"]


# ---- finding ---------------------------------------------------------------------------------
def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flipped(path: Path) -> None:
    """One bit of a weight is wrong: only the check sum tells."""
    content = bytearray(path.read_bytes())
    place = content.index(torch.full((4,), 7.0).numpy().tobytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut, " is no readable weight file ("),
        (empty, " is no readable weight file ("),
        (zeroed, " is no readable weight file ("),
        (flipped, " is damaged: the check sum of archive/data/0 is wrong"),
    ],
)
def test_a_broken_checkpoint_is_passed_over_with_one_line(tmp_path, caplog, damage, told):
    save(tmp_path, 3)
    save(tmp_path, 7)
    damage(tmp_path / "model_0000007.pth")
    with caplog.at_level(logging.WARNING, "d2ctx"):
        assert resumed(tmp_path) == 3
    (line,) = [r.message for r in caplog.records if r.name.startswith("d2ctx")]
    assert line.startswith(f"{tmp_path / 'model_0000007.pth'}{told}")
    assert line.endswith("; going on from model_0000003.pth instead")


def test_the_only_checkpoint_being_broken_is_an_error(tmp_path):
    save(tmp_path, 3)
    cut(tmp_path / "model_0000003.pth")
    with pytest.raises(UserError, match=r"model_0000003\.pth is no readable weight file"):
        resumed(tmp_path)


def test_a_checkpoint_without_its_name_is_found(tmp_path):
    save(tmp_path, 3)
    (tmp_path / "last_checkpoint").unlink()
    assert resumed(tmp_path) == 3


def test_the_name_decides_and_those_behind_it_are_not_used(tmp_path):
    for iteration in (3, 7, 9):
        save(tmp_path, iteration)
    (tmp_path / "last_checkpoint").write_text("model_0000007.pth")
    expected = ["model_0000007.pth", "model_0000003.pth"]
    assert [path.name for path in to_resume_from(tmp_path)] == expected
    assert resumed(tmp_path) == 7


def test_the_final_checkpoint_is_the_newest(tmp_path):
    for name in ("model_0000009.pth", "model_final.pth", "model_00000010.pth", "model_best.pth"):
        (tmp_path / name).touch()
    assert [path.name for path in checkpoint_files(tmp_path)] == [
        "model_final.pth",
        "model_00000010.pth",
        "model_0000009.pth",
    ]


# ---- starting anew ---------------------------------------------------------------------------
def test_an_earlier_run_is_set_aside_whole(tmp_path, caplog):
    for _ in (1, 2):
        save(tmp_path, 3)
        (tmp_path / "losses.jsonl").write_text("{}")
        (tmp_path / "config.yaml").write_text("new")
        set_aside(tmp_path)
    assert names(tmp_path) == ["config.yaml", "earlier"]
    for number in ("1", "2"):
        kept = ["last_checkpoint", "losses.jsonl", "model_0000003.pth"]
        assert names(tmp_path / "earlier" / number) == kept
    assert "held an earlier run: its 1 checkpoint and records are now in" in caplog.text


def test_a_folder_without_checkpoints_stays_as_it_is(tmp_path):
    (tmp_path / "losses.jsonl").write_text("{}")
    set_aside(tmp_path)
    assert names(tmp_path) == ["losses.jsonl"]
