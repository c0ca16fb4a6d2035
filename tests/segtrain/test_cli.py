import argparse
import os
import re
import subprocess
import sys

import pytest

from segtrain.cli import build_parser, main
from segtrain.data.synthetic import FORMATS
from segtrain.errors import Interrupted, UserError
from tests.segtrain.config_files import SMALL, write


def synth(*arguments):
    return main(["data", "synth", *(str(a) for a in arguments)])


def test_synth_writes_then_says_already_there(tmp_path, capsys):
    arguments = ["--out", tmp_path / "set", "--num", 4, "--seed", 2, "--size", "48x32"]
    assert synth(*arguments) == 0
    assert "wrote 3 train and 1 val images (coco)" in capsys.readouterr().out
    assert synth(*arguments) == 0
    assert capsys.readouterr().out.startswith("already there: ")


def test_one_number_is_a_square(tmp_path):
    parsed = build_parser().parse_args(
        ["data", "synth", "--out", "x", "--num", "1", "--size", "64"]
    )
    assert parsed.size == (64, 64)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--num", 0], "num must be 1..1000000, got 0"),
        (["--num", 1, "--size", "7"], "size must be 32..4096 pixels per side, got 7x7"),
        (["--num", 1, "--size", "axb"], "expected SIDE or WxH like 256 or 384x256, got 'axb'"),
        (["--num", "many"], "argument --num: invalid int value: 'many'"),
        (["--num", 1, "--format", "voc"], "choose from"),
        (["--num", 1, "--val-fraction", 2], "val-fraction must be at least 0 and below 1"),
        ([], "the following arguments are required: --num"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(tmp_path, capsys, arguments, text):
    try:
        code = synth("--out", tmp_path / "set", *arguments)
    except SystemExit as stop:
        code = stop.code
    lines = capsys.readouterr().err.splitlines()
    assert code == 2
    assert len(lines) == 1
    assert text in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_foreign_directory_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "notes").write_text("mine")
    assert synth("--out", tmp_path, "--num", 1, "--size", 32) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_progress_counts_up_on_one_line_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert synth("--out", tmp_path / "set", "--num", 2, "--size", 32) == 0
    assert capsys.readouterr().err == "\rdrawing 1/2\rdrawing 2/2\n"


def test_interrupt_is_one_line(tmp_path, capsys, monkeypatch):
    def interrupt(**kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("segtrain.data.synthetic.writers.write_dataset", interrupt)
    assert synth("--out", tmp_path / "set", "--num", 2) == 130
    assert capsys.readouterr().err == "segtrain: interrupted\n"


def parsers(parser, path=()):
    """Every parser with the words that lead to it."""
    yield path, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from parsers(child, (*path, name))


HELP = {path: parser.format_help() for path, parser in parsers(build_parser())}


@pytest.mark.parametrize("path", HELP, ids=" ".join)
def test_help_of_every_command_starts_with_its_name(path):
    assert HELP[path].startswith(" ".join(["usage: segtrain", *path]))


LEAVES = [path for path in HELP if path and "COMMAND ..." not in HELP[path]]


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_every_command_or_its_group_shows_examples(path):
    shown = "".join(HELP[path[:k]] for k in range(1, len(path) + 1))
    assert re.search(rf"^  segtrain {' '.join(path)}\b", shown, re.MULTILINE)


def test_help_is_printed_with_exit_code_0(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == HELP[("doctor",)]


def test_formats_in_the_help_are_those_of_the_writer():
    def action(parser, name):
        return next(a for a in parser._actions if name in (a.dest, *a.option_strings))

    parser = build_parser()
    for name in ("data", "synth"):
        groups = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        parser = next(groups).choices[name]
    assert tuple(action(parser, "--format").choices) == FORMATS


def test_import_is_quiet_and_light():
    code = (
        "import sys, segtrain, segtrain.cli; segtrain.cli.build_parser(); "
        "heavy = {'torch', 'numpy', 'PIL', 'cv2', 'pydantic', 'yaml', 'rich'} & set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def running(monkeypatch, error):
    """The exit code of a command that raises `error`."""

    def fail(args):
        raise error

    monkeypatch.setattr("segtrain.doctor.run", fail)
    return lambda *options: main([*options, "doctor"])


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("no such thing; try another"), 2, "error: no such thing; try another"),
        (FileNotFoundError(2, "No such file or directory", "x"), 2, "error: [Errno 2] No such"),
        (
            ModuleNotFoundError("No module named 'yaml.x'", name="yaml.x"),
            2,
            "error: the package yaml.x is missing; run: pip install 'ctxseg[seg]'",
        ),
        (Interrupted("saved at step 5"), 75, "saved at step 5"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_ends_a_command_becomes_a_line_and_an_exit_code(
    monkeypatch, capsys, error, code, text
):
    assert running(monkeypatch, error)() == code
    err = capsys.readouterr().err
    assert err.startswith(f"segtrain: {text}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), ModuleNotFoundError("No module", name="segtrain.nothing")]
)
def test_our_own_mistakes_keep_their_traceback(monkeypatch, error):
    with pytest.raises(type(error)):
        running(monkeypatch, error)()


def test_traceback_on_request(monkeypatch, capsys):
    assert running(monkeypatch, UserError("no"))("--traceback") == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("segtrain: error: no\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["doctor", "optim.lr=3"],
        ["doctor", "--nothing"],
        ["config", "show", "x.yaml", "a=1", "--nothing"],
        ["nothing"],
        [],
    ],
)
def test_words_that_no_command_takes(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["schema"], ["diff", "FILE", "FILE"]])
def test_a_reader_that_has_had_enough_is_no_error(tmp_path, arguments):
    file = str(write(tmp_path / "x.yaml", SMALL))
    arguments = [file if word == "FILE" else word for word in arguments]
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "segtrain", "config", *arguments],
        env=buffered,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_module_runs_like_the_command(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-m",
            "segtrain",
            "data",
            "synth",
            "--out",
            str(tmp_path / "set"),
        ]
        + ["--num", "2", "--size", "32", "--workers", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "set" / "synth.json").exists()
