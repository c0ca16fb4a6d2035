"""Disks that are full or may not be written, other clocks and other machines."""

import errno
import hashlib
import os
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from segtrain.errors import UserError
from segtrain.files import run_lock
from segtrain.train.journal import Journal
from tests.stress.kills import Trainer, assert_same_run, check_after_kill
from tests.stress.test_kills import killed_at

pytestmark = pytest.mark.timeout(1800)  # a minute or two on an idle machine

_YEARS = 10 * 365 * 24 * 3600.0


@contextmanager
def mounted(folder: Path, *options: str):
    """A file system of its own in a folder."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", ",".join(("size=16m", *options)), "none", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, *options: str) -> None:
    subprocess.run(["mount", "-o", ",".join(("remount", *options)), str(folder)], check=True)


def contents(run: Path) -> dict[str, str]:
    """What the files of its checkpoints hold, by name."""
    files = sorted((run / "checkpoints").iterdir())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def begun(trainer: Trainer, run: Path) -> Path:
    """A run that was killed with a checkpoint behind it."""
    assert killed_at(trainer, run, what="open results.json.*")
    return run


def error_of(trainer: Trainer, run: Path, *faults) -> str:
    """The one line of a run that ends with exit code 2."""
    started = trainer.go_on(run, *faults)
    assert started.wait() == 2, started.said()
    assert "Traceback" not in started.said()
    lines = [line for line in started.said().splitlines() if line.startswith("segtrain: error:")]
    assert len(lines) == 1, started.said()
    return lines[0]


def test_a_file_that_may_not_grow(trainer, tmp_path):
    """As with a full disk or a quota; needs no rights."""
    straight, run = trainer.finish(tmp_path / "straight"), begun(trainer, tmp_path / "run")
    before = contents(run)
    said = error_of(trainer, run, ("largest_file", {"size": 20_000}))
    assert f"cannot write {run}/checkpoints/best.safetensors: File too large; make room" in said
    assert contents(run) == before
    assert_same_run(trainer.finish(run), straight)


@pytest.mark.stress
def test_a_full_disk(trainer, tmp_path):
    straight = trainer.finish(tmp_path / "straight")
    with mounted(tmp_path / "disk") as disk:
        run = begun(trainer, disk / "run")
        before, free = contents(run), os.statvfs(disk)
        filler = disk / "filler"
        filler.write_bytes(bytes(free.f_bavail * free.f_frsize - 40_000))
        said = error_of(trainer, run)
        assert f"cannot write {run}/checkpoints/" in said
        assert "No space left on device; make room there" in said
        check_after_kill(run)
        assert contents(run) == before
        filler.unlink()
        assert_same_run(trainer.finish(run), straight)


@pytest.mark.stress
def test_a_disk_that_fills_up_at_any_byte(trainer, tmp_path):
    """Room for the journal or not, for the state or not, for the weights or not."""
    straight = trainer.finish(tmp_path / "straight")
    with mounted(tmp_path / "disk") as disk:
        for left in range(0, 120_000, 15_000):
            run = begun(trainer, disk / f"run_{left}")
            free = os.statvfs(disk)
            filler = disk / "filler"
            filler.write_bytes(bytes(free.f_bavail * free.f_frsize - left))
            started = trainer.go_on(run)
            code = started.wait()
            assert code in (0, 2), started.said()
            if code == 2:
                assert "No space left on device; make room there" in started.said(), left
            check_after_kill(run)
            filler.unlink()
            assert_same_run(trainer.finish(run), straight)


def test_a_journal_on_a_full_disk(tmp_path):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")
    (tmp_path / "log.jsonl").symlink_to(full)
    with pytest.raises(UserError, match=r"log\.jsonl: No space left on device; make room there"):
        Journal(tmp_path).write("train", 1, {"loss": 1.0})


def test_an_output_below_a_file(trainer, tmp_path):
    (tmp_path / "file").write_text("")
    said = error_of(trainer, tmp_path / "file" / "run")
    assert said.startswith(f"segtrain: error: cannot write {tmp_path}/file/run: Not a directory;")


@pytest.mark.stress
def test_an_output_that_is_read_only(trainer, tmp_path):
    """Said before anything is read or built, for a new run and for one to go on with."""
    straight = trainer.finish(tmp_path / "straight")
    with mounted(tmp_path / "disk") as disk:
        run = begun(trainer, disk / "run")
        before = contents(run)
        remount(disk, "ro")
        said = error_of(trainer, run)
        assert f"cannot write {run}/.lock: Read-only file system; make room there, or mend" in said
        said = error_of(trainer, disk / "new")
        assert f"cannot write {disk}/new: Read-only file system;" in said
        assert contents(run) == before
        remount(disk, "rw")
        assert_same_run(trainer.finish(run), straight)


@pytest.mark.stress
@pytest.mark.parametrize("years", [-_YEARS, _YEARS], ids=["past", "future"])
def test_another_machine_at_another_time(trainer, tmp_path, years):
    straight, run = trainer.finish(tmp_path / "straight"), begun(trainer, tmp_path / "run")
    assert (run / ".lock").read_text().startswith("process ")
    # A process that lives, but is not the one that held the lock.
    (run / ".lock").write_text("process 1 on a-machine-that-is-gone\n")
    for path in run.rglob("*"):
        os.utime(path, (time.time() - years,) * 2)
    elsewhere = ("other_machine", {"name": "elsewhere", "seconds": years})
    assert_same_run(trainer.finish(run, elsewhere), straight)
    assert (run / ".lock").read_text().endswith(" on elsewhere\n")


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with run_lock(tmp_path):
        pass


@pytest.mark.stress
@pytest.mark.parametrize("name", ["last.pt", "step_00000004.pt"])
def test_a_checkpoint_that_is_damaged_later(trainer, tmp_path, name):
    """The run goes on from the one before, says so, and ends as it would have."""
    straight = trainer.finish(tmp_path / "straight")
    run = tmp_path / "run"
    assert killed_at(trainer, run, what="os.remove checkpoints/step_00000003.pt")
    damaged = run / "checkpoints" / name
    damaged.write_bytes(damaged.read_bytes()[:1000])
    started = trainer.go_on(run)
    assert started.wait() == 0, started.said()
    named = f"{damaged} cannot be read" in started.said()
    assert named == (name == "last.pt")
    assert_same_run(run, straight)
