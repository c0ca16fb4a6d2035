"""The table of results and the curves of one or several runs."""

import json
from pathlib import Path

import matplotlib.figure
import pytest
from PIL import Image

from d2ctx.report import main, results_table, write_curves

BOX = {"AP": 41.04, "AP50": 62.5, "AP75": 44.9}
MASK = {"AP": 36.26, "AP50": 58.1, "AP75": 38.7}
PANOPTIC = {"PQ": 40.14, "SQ": 77.8, "RQ": 49.25, "PQ_th": 45.0, "PQ-sky": 80.0}
RECORDS = [
    {"iteration": 19, "total_loss": 2.5},
    {"iteration": 39, "total_loss": 1.5, "bbox/AP50": 20.0, "segm/AP50": 10.0},
    {"iteration": 59, "total_loss": 0.5, "bbox/AP50": 60.0, "segm/AP50": 50.0},
]


def write_run(
    folder: Path, *, results: dict | None = None, records: list[dict] = RECORDS, tail: str = ""
) -> Path:
    """The output folder of a run with these results and metrics."""
    folder.mkdir()
    results = {"bbox": BOX, "segm": MASK} if results is None else results
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "metrics.json").write_text("".join(f"{json.dumps(r)}\n" for r in records) + tail)
    return folder


def table(*runs: Path) -> list[list[str]]:
    """Cells of the table, the header and its underline left out."""
    return [line.split() for line in results_table(runs).splitlines()[2:]]


@pytest.fixture
def curves(monkeypatch):
    """Draw runs and return what is plotted: (loss curves, AP curves), each label -> points."""
    figures = []
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda figure, *_, **__: figures.append(figure)
    )

    def curves(*runs: Path) -> list[dict[str, list]]:
        write_curves(runs, runs[0] / "curves.png")
        return [
            {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
            for axes in figures.pop().axes
        ]

    return curves


# ---- table -----------------------------------------------------------------------------------
def test_table_holds_box_then_mask_scores_of_each_run(tmp_path):
    first = write_run(tmp_path / "first")
    second = write_run(tmp_path / "second", results={"bbox": MASK, "segm": BOX})
    box, mask = ["41.0", "62.5", "44.9"], ["36.3", "58.1", "38.7"]
    assert table(first, second) == [["first", *box, *mask], ["second", *mask, *box]]


def test_runs_whose_folders_have_one_name_keep_their_lines(tmp_path):
    (tmp_path / "other").mkdir()
    runs = [write_run(folder / "run") for folder in (tmp_path, tmp_path / "other")]
    assert [row[0] for row in table(*runs)] == ["run", "run"]


def test_header_names_the_columns(tmp_path):
    header = results_table([write_run(tmp_path / "run")]).splitlines()[0]
    names = ["box AP", "box AP50", "box AP75", "mask AP", "mask AP50", "mask AP75"]
    assert " ".join(header.split()) == " ".join(["run", *names])


def test_a_run_without_masks_leaves_their_columns_empty(tmp_path):
    assert table(write_run(tmp_path / "run", results={"bbox": BOX})) == [
        ["run", "41.0", "62.5", "44.9"]
    ]


def test_several_test_sets_have_a_line_each(tmp_path):
    results = {"easy": {"bbox": BOX}, "hard": {"bbox": MASK}}
    assert table(write_run(tmp_path / "run", results=results)) == [
        ["run", "easy", "41.0", "62.5", "44.9"],
        ["run", "hard", "36.3", "58.1", "38.7"],
    ]


def test_panoptic_quality_has_columns_where_a_run_has_it(tmp_path):
    detector = write_run(tmp_path / "detector", results={"bbox": BOX})
    panoptic = write_run(tmp_path / "panoptic", results={"bbox": BOX, "panoptic_seg": PANOPTIC})
    assert "PQ" not in results_table([detector])
    assert results_table([detector, panoptic]).splitlines()[0].split()[-3:] == ["PQ", "SQ", "RQ"]
    box = ["41.0", "62.5", "44.9"]
    assert table(detector, panoptic) == [
        ["detector", *box],
        ["panoptic", *box, "40.1", "77.8", "49.2"],
    ]


def test_a_run_of_panoptic_quality_alone_is_one_line(tmp_path):
    run = write_run(tmp_path / "run", results={"panoptic_seg": PANOPTIC})
    assert table(run) == [["run", "40.1", "77.8", "49.2"]]


# ---- curves ----------------------------------------------------------------------------------
def test_curves_show_loss_and_ap50_over_iterations(tmp_path, curves):
    loss, score = curves(write_run(tmp_path / "run"))
    assert loss == {"run": [[19, 2.5], [39, 1.5], [59, 0.5]]}
    assert score == {"run box": [[39, 20], [59, 60]], "run mask": [[39, 10], [59, 50]]}


def test_runs_are_drawn_over_each_other(tmp_path, curves):
    loss, score = curves(write_run(tmp_path / "a"), write_run(tmp_path / "b", records=RECORDS[:1]))
    assert {name: len(points) for name, points in loss.items()} == {"a": 3, "b": 1}
    assert set(score) == {"a box", "a mask"}


def test_a_truncated_last_record_is_skipped(tmp_path, curves):
    run = write_run(tmp_path / "run", tail='{"iteration": 79, "total_lo')
    assert curves(run)[0]["run"][-1] == [59, 0.5]


def test_iterations_repeated_after_resuming_count_once(tmp_path, curves):
    repeated = [{"iteration": 39, "total_loss": 0.9}, {"iteration": 59, "total_loss": 0.7}]
    loss, _ = curves(write_run(tmp_path / "run", records=RECORDS + repeated))
    assert loss["run"] == [[19, 2.5], [39, 0.9], [59, 0.7]]


def test_several_test_sets_have_a_curve_each(tmp_path, curves):
    records = [{"iteration": 9, "easy/bbox/AP50": 30.0, "hard/segm/AP50": 5.0}]
    _, score = curves(write_run(tmp_path / "run", records=records))
    assert score == {"run easy box": [[9, 30]], "run hard mask": [[9, 5]]}


def test_panoptic_quality_is_drawn_too(tmp_path, curves):
    records = [{"iteration": 9, "panoptic_seg/PQ": 30.0, "panoptic_seg/PQ_th": 5.0}]
    _, score = curves(write_run(tmp_path / "run", records=records))
    assert score == {"run panoptic": [[9, 30]]}


# ---- command line ----------------------------------------------------------------------------
def test_command_reports_a_trained_run(finished, tmp_path, capsys):
    path = tmp_path / "plot.png"
    assert main([str(finished.output), "--out", str(path)]) == 0
    out = capsys.readouterr().out
    scores = finished.results()["bbox"]
    assert f"{scores['AP']:.1f}" in out.splitlines()[2].split()
    assert out.splitlines()[-1] == f"wrote {path}"
    assert Image.open(path).format == "PNG"


def test_the_plot_goes_into_the_first_run_by_default(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    assert main([str(run) for run in runs]) == 0
    assert [path.parent for path in tmp_path.rglob("curves.png")] == [runs[0]]


@pytest.mark.parametrize("missing", ["results.json", "metrics.json"])
def test_a_folder_that_is_no_run_is_one_line(tmp_path, capsys, missing):
    run = write_run(tmp_path / "run")
    (run / missing).unlink()
    assert main([str(run)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert f"{run / missing} does not exist; train first, or mend the path" in err
    assert err.count("\n") == 1
