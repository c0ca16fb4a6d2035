"""`make demo-seg`: what it runs is there, fits together, and is not done twice."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from segtrain.cli import build_parser, main
from segtrain.config.load import load_config
from tests.contracts.source_tree import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(*arguments: object, **variables: object) -> str:
    """What make prints, with the environment taken as installed."""
    given = [f"{name}={value}" for name, value in variables.items()]
    command = ["make", "--old-file", ".venv/.ready", *map(str, arguments), *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def commands(text: str) -> list[list[str]]:
    """The words behind `segtrain` of every command that make printed."""
    lines = text.replace("\\\n", " ").replace("; fi", "").replace(";", "\n").splitlines()
    parts = [line.partition("-m segtrain ") for line in lines]
    return [shlex.split(words) for _, found, words in parts if found]


@pytest.fixture(scope="module")
def planned():
    """(first two words, parsed arguments) of what a fresh clone would run."""
    found = commands(make("demo-seg", "--dry-run", "--always-make"))
    return [(" ".join(words[:2]), build_parser().parse_args(words)) for words in found]


def arguments_of(planned, name: str):
    return next(parsed for words, parsed in planned if words.startswith(name))


# ---- the rule --------------------------------------------------------------------------------
def test_commands_are_the_users_own_in_their_order(planned):
    names = [words.split()[0] for words, _ in planned]
    assert names == ["data", "data", "resume", "train", "eval", "predict", "runs"]


def test_everything_lies_where_the_configuration_says(planned):
    config = load_config(ROOT / arguments_of(planned, "train").config)
    scenes, run = Path(config.data.root), Path(config.output)
    assert Path(arguments_of(planned, "data synth").out) == scenes
    assert arguments_of(planned, "data check").items == [arguments_of(planned, "train").config]
    assert arguments_of(planned, "resume").folder == run
    assert arguments_of(planned, "eval").source == run
    assert arguments_of(planned, "predict").source == run
    assert arguments_of(planned, "predict").input == scenes / "images" / config.data.val_split
    assert arguments_of(planned, "predict").out.parent == run
    assert arguments_of(planned, "runs plot").runs == [run]


# ---- a whole one -----------------------------------------------------------------------------
@pytest.fixture
def place(tmp_path):
    """Variables of make for a run of two updates on small scenes."""
    scenes, run, file = tmp_path / "scenes", tmp_path / "run", tmp_path / "tiny.yaml"
    written = ["--num", "6", "--size", "32", "--val-fraction", "0.5", "--seed", "1"]
    assert main(["data", "synth", "--out", str(scenes), "--format", "folder", *written]) == 0
    tiny = {
        "data": {"root": str(scenes), "crop": [32, 32], "base_size": [32, 32], "workers": 0},
        "model": {"embed_dim": 8, "depth": 1, "num_heads": 2},
        "schedule": {"warmup_iters": 0},
        "train": {"iters": 2, "global_batch": 2, "eval_every": 1, "log_every": 1},
    }
    base = ROOT / "configs" / "seg" / "segmenter" / "seg_tiny_instant.yaml"
    file.write_text(yaml.safe_dump({"_base_": str(base), "output": str(run), **tiny}))
    return {"PY": sys.executable, "SEG_SCENES": scenes, "SEG_RUN": run, "SEG_CONFIG": file}


@pytest.mark.slow
def test_pictures_come_out_and_a_second_time_is_for_drawing_only(place):
    run = place["SEG_RUN"]
    assert "boundary IoU" in make("demo-seg", **place)
    names = {path.stem for path in (place["SEG_SCENES"] / "images" / "val").iterdir()}
    for kind in ("overlays", "side_by_side"):
        assert {path.stem for path in (run / "predictions" / kind).iterdir()} == names
    assert (run / "curves.png").stat().st_size > 0
    assert (run / "scores.json").stat().st_size > 0
    again = commands(make("demo-seg", "--dry-run", **place))
    assert [words[0] for words in again] == ["predict", "runs"]


@pytest.mark.slow
def test_a_run_without_scores_is_resumed_not_started_anew(place):
    run = place["SEG_RUN"]
    assert main(["train", "--config", str(place["SEG_CONFIG"])]) == 0
    journal = (run / "log.jsonl").read_text()
    make(run / "scores.json", **place)
    assert (run / "scores.json").exists()
    later = (run / "log.jsonl").read_text()
    assert later.startswith(journal)
    assert '"event": "resume"' in later
