"""The picture of losses and scores of one or several runs."""

import json
from pathlib import Path

import matplotlib.figure
import pytest
from PIL import Image

from segtrain.cli import main
from segtrain.curves import draw_curves

RECORDS = [
    {"event": "start", "step": 0},
    {"event": "train", "step": 10, "loss": 2.0, "lr": 0.1},
    {"event": "train", "step": 20, "loss": 1.0, "lr": 0.05},
    {"event": "save", "step": 20},
    {"event": "evaluate", "step": 20, "miou": 0.625},
    {"event": "train", "step": 30, "loss": 0.5, "lr": 0.01},
    {"event": "evaluate", "step": 30, "miou": 0.5},
]


def write_run(folder: Path, records: list[dict] = RECORDS, *, tail: str = "") -> Path:
    """The folder of a run with this journal."""
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records) + tail)
    return folder


def plot(*arguments: object) -> int:
    return main(["runs", "plot", *map(str, arguments)])


@pytest.fixture
def drawn(monkeypatch):
    """Draw runs and return what is plotted: (losses, scores), each label -> points."""
    figures = []
    savefig = matplotlib.figure.Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)

    def drawn(*runs: Path) -> list[dict[str, list]]:
        draw_curves(runs, runs[0] / "curves.png")
        return [
            {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
            for axes in figures.pop().axes
        ]

    return drawn


# ---- what is drawn ---------------------------------------------------------------------------
def test_losses_left_and_scores_in_percent_right(tmp_path, drawn):
    run = write_run(tmp_path / "run")
    losses, scores = drawn(run)
    assert losses == {str(run): [[10, 2.0], [20, 1.0], [30, 0.5]]}
    assert scores == {str(run): [[20, 62.5], [30, 50.0]]}


def test_every_run_has_its_line(tmp_path, drawn):
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b", RECORDS[:3])
    losses, scores = drawn(first, second)
    assert losses[str(second)] == [[10, 2.0], [20, 1.0]]
    assert list(losses) == list(scores) == [str(first), str(second)]
    assert scores[str(second)] == []


def test_what_a_crash_cut_off_or_is_no_number_is_left_out(tmp_path, drawn):
    empty_split = {"event": "evaluate", "step": 30, "miou": None}
    run = write_run(tmp_path / "run", [*RECORDS[:3], empty_split], tail='{"event": "tra')
    losses, scores = drawn(run)
    assert losses[str(run)] == [[10, 2.0], [20, 1.0]]
    assert scores[str(run)] == []


# ---- the command -----------------------------------------------------------------------------
def test_picture_lies_in_the_first_run_and_scores_are_told(tmp_path, capsys):
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b", RECORDS[:3])
    assert plot(first, second) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{first}: mIoU 50.00 % after 30 updates, best 62.50 % after 20",
        f"{second}: not evaluated yet",
        f"wrote {first / 'curves.png'}",
    ]
    assert Image.open(first / "curves.png").size == (1320, 480)
    assert sorted(path.name for path in first.iterdir()) == ["curves.png", "log.jsonl"]


def test_out_names_place_and_format(tmp_path):
    out = tmp_path / "new" / "both.SVG"
    assert plot(write_run(tmp_path / "run"), "--out", out) == 0
    assert "<svg" in out.read_text()


def test_a_second_picture_takes_the_place_of_the_first(tmp_path):
    run = write_run(tmp_path / "run", RECORDS[:3])
    assert plot(run) == 0
    before = (run / "curves.png").read_bytes()
    (run / "log.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in RECORDS))
    assert plot(run) == 0
    assert (run / "curves.png").read_bytes() != before


@pytest.mark.parametrize(
    ("records", "out", "text"),
    [
        (None, "a.png", "is no run, it has no log.jsonl; name the output of a run"),
        (RECORDS[:1], "a.png", "has no loss and no score to draw yet; wait, or lower"),
        (RECORDS, "a.bmq", "a.bmq: no picture has this ending; use one of "),
        (RECORDS, "curves", "curves: no picture has this ending; use one of "),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(tmp_path, capsys, records, out, text):
    run = tmp_path / "run"
    if records is not None:
        write_run(run, records)
    assert plot(run, "--out", tmp_path / out) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert text in lines[0]
    assert not (tmp_path / out).exists()
