import json

import pytest
import yaml

from segtrain.cli import main
from segtrain.config.load import load_config
from tests.segtrain.config_files import SMALL, small, write


@pytest.fixture
def run(tmp_path):
    return str(write(tmp_path / "run.yaml", SMALL))


def test_show_prints_yaml_that_is_read_back_equal(tmp_path, run, capsys):
    assert main(["config", "show", run, "optim.lr=1e-5", "train.seed=4"]) == 0
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out)
    config = load_config(again)
    assert config == load_config(run, ["optim.lr=1e-5", "train.seed=4"])
    assert config.optim.lr == 1e-5


@pytest.mark.parametrize(
    "arguments",
    [["FILE", "--json", "train.seed=4"], ["--json", "FILE", "train.seed=4"]],
)
def test_show_json_wherever_the_option_stands(run, capsys, arguments):
    arguments = [run if word == "FILE" else word for word in arguments]
    assert main(["config", "show", *arguments]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["train"]["seed"] == 4
    assert content["data"]["crop"] == [64, 96]


def test_errors_are_on_stderr_with_exit_code_2(run, capsys):
    assert main(["config", "show", run, "optim.lrr=1"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == ("segtrain: error: command line: unknown key optim.lrr; did you mean optim.lr?\n")


def test_diff(tmp_path, run, capsys):
    other = str(write(tmp_path / "other.yaml", small(optim__lr=1.0, output="output/run")))
    assert main(["config", "diff", run, run]) == 0
    assert capsys.readouterr().out == "no difference\n"
    assert main(["config", "diff", run, other]) == 0
    assert capsys.readouterr().out == "optim.lr  0.001 -> 1.0\n"
    assert main(["config", "diff", run, other, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows == [{"key": "optim.lr", "first": 0.001, "second": 1.0}]


def test_schema_is_json_and_fits_a_file(run, capsys):
    assert main(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(yaml.safe_load(open(run))) <= set(schema["properties"])
