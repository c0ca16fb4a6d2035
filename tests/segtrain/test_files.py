import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from segtrain.errors import UserError
from segtrain.files import plain, replacing, run_lock, write_bytes, write_json, write_text


def test_written_whole_and_nothing_beside(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "é\n")
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_beside(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def write_half():
        with replacing(path) as partial:
            partial.write_text("ha")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    order = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("sync"), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("name"), replace(a, b)))
    write_text(tmp_path / "a", "x")
    assert order == ["sync", "name", "sync"]


def test_json_says_numbers_of_numpy_and_torch_and_null_for_nan(tmp_path):
    value = {
        "a": np.float32(0.5),
        "b": np.array([1, 2]),
        "c": torch.tensor(3),
        "d": (float("nan"), np.float64("inf"), None, True, "é"),
        1: Path("x"),
        "e": np.array([np.nan, 1.0]),
    }
    write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "a": 0.5,
        "b": [1, 2],
        "c": 3,
        "d": [None, None, None, True, "é"],
        "1": "x",
        "e": [None, 1.0],
    }


def test_json_refuses_what_it_cannot_say(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert list(tmp_path.iterdir()) == []
    assert plain({"a": True})["a"] is True


HOLD = (
    "import sys; from pathlib import Path; from segtrain.files import run_lock\n"
    "with run_lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture
def holder(tmp_path):
    (tmp_path / ".lock").write_text("process 1 on a machine with a long name that held it before\n")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def hold(folder):
    with run_lock(folder):
        pass


def test_a_second_process_is_refused_and_told_who_is_first(tmp_path, holder):
    with pytest.raises(UserError, match=f"is in use by process {holder.pid} on ") as caught:
        hold(tmp_path)
    assert "choose another output" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_lock_of_a_killed_process_is_free(tmp_path, holder):
    holder.kill()
    holder.wait()
    hold(tmp_path)


def test_the_lock_is_free_after_use_and_after_an_error(tmp_path):
    def fail():
        with run_lock(tmp_path):
            raise RuntimeError

    hold(tmp_path)
    with pytest.raises(RuntimeError):
        fail()
    hold(tmp_path)


def test_the_same_process_cannot_hold_it_twice(tmp_path):
    with run_lock(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} on "):
        hold(tmp_path)


def test_the_lock_is_free_though_a_worker_has_its_file_open(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    flock, copies = fcntl.flock, []

    def flock_and_fork(handle, operation):
        copies.append(os.dup(handle))  # what a forked process has
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock_and_fork)
    hold(tmp_path)
    monkeypatch.undo()
    hold(tmp_path)
    for handle in copies:
        os.close(handle)
