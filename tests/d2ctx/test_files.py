"""Files are written whole or not at all."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from d2ctx import files


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    files.write_text(path, "old")

    def interrupted(partial: Path, content: bytes) -> None:
        with partial.open("wb") as file:
            file.write(content[:1])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_text(path, "new")
    assert path.read_text() == "old"


def test_writing_leaves_nothing_but_the_file(tmp_path):
    files.write_text(tmp_path / "a.txt", "one")
    files.write_text(tmp_path / "a.txt", "two")
    assert [(path.name, path.read_text()) for path in tmp_path.glob("a*")] == [("a.txt", "two")]


def test_numbers_of_numpy_and_torch_become_plain_json(tmp_path):
    path = tmp_path / "results.json"
    files.write_json(path, {"a": np.float32(0.5), "b": np.int64(3), "c": torch.tensor(2.5)})
    assert json.loads(path.read_text()) == {"a": 0.5, "b": 3, "c": 2.5}


def test_a_score_that_does_not_exist_becomes_null_as_json_demands(tmp_path):
    path = tmp_path / "results.json"
    files.write_json(path, {"bbox": {"APl": float("nan"), "AP": [0.5, float("inf")]}})
    assert json.loads(path.read_text()) == {"bbox": {"APl": None, "AP": [0.5, None]}}
