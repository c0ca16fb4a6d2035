import json
import re
import tomllib

import pytest

from segtrain import doctor
from segtrain.cli import main
from tests.contracts.source_tree import ROOT


def rows(capsys, *arguments):
    code = main(["doctor", "--json", *arguments])
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] == (code == 0)
    return code, {row["name"]: row for row in report["findings"]}


def test_packages_and_lowest_versions_are_those_that_are_installed_with_us():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = (ROOT / "requirements.txt").read_text().split() + extra["optional-dependencies"]["seg"]
    assert doctor.NEEDED == dict(requirement.split(">=") for requirement in asked)


def test_all_is_well_here_and_every_line_says_something(capsys):
    code, found = rows(capsys)
    assert code == 0
    assert found["torch works"]["state"] == "ok"
    assert found["torchvision works"]["value"] == "its operators fit torch"
    assert re.match(r"\d", found["pydantic"]["value"])
    assert int(found["CPU cores"]["value"]) >= 1
    assert all(row["value"] for row in found.values())


def test_text_report_ends_with_the_verdict(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "everything needed works"
    assert lines[0].startswith("python ")


def test_a_missing_package_is_a_problem_with_its_command(capsys, monkeypatch):
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "rich" else version(name))
    code, found = rows(capsys)
    assert code == 1
    assert found["rich"]["state"] == "problem"
    assert found["rich"]["fix"].endswith("-m pip install 'rich>=13'")


def test_an_old_package_is_a_problem_and_a_stand_in_is_not(capsys, monkeypatch):
    versions = {name: "99" for name in doctor.NEEDED}
    versions |= {"timm": "0.9.16", "torch": "2.10.0+cpu", "opencv-python": "4.9"}
    del versions["opencv-python-headless"]
    monkeypatch.setattr(doctor, "_version", versions.get)
    code, found = rows(capsys)
    assert code == 1
    assert [name for name, row in found.items() if row["state"] == "problem"] == ["timm"]
    assert "--upgrade 'timm>=1.0'" in found["timm"]["fix"]
    assert found["opencv-python-headless"]["value"] == "4.9"
    assert "train.tensorboard" in found["tensorboard"]["fix"]


def test_what_a_broken_library_throws_is_reported(capsys, monkeypatch):
    def broken():
        raise ImportError("libGL.so.1: cannot open\nshared object file")

    monkeypatch.setitem(doctor.TRIALS, "OpenCV works", broken)
    code = main(["doctor"])
    text = capsys.readouterr().out
    assert code == 1
    assert "ImportError: libGL.so.1: cannot open shared object file  [problem]" in text
    assert "--force-reinstall opencv-python-headless" in text
    assert text.endswith("problems: 1\n")


@pytest.mark.parametrize(("free", "state"), [(0.5, "note"), (500, "ok")])
def test_little_room_is_a_note(capsys, monkeypatch, free, state):
    class Usage:
        def __init__(self, path):
            self.free = free * (1 << 30)

    monkeypatch.setattr(doctor.shutil, "disk_usage", Usage)
    code, found = rows(capsys)
    assert code == 0
    assert found["free disk here"]["state"] == state
    if "shared memory" in found:
        assert found["shared memory"]["state"] == state
        assert bool(found["shared memory"]["fix"]) == (state == "note")
