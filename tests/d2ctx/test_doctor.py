"""The doctor names the command for every problem, and runs where nothing is installed."""

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from d2ctx.doctor import cli, probes
from d2ctx.doctor.diagnose import diagnose, release
from d2ctx.doctor.facts import DISTRIBUTIONS, OPENCV_BUILDS, Facts
from d2ctx.doctor.python_version import complaint
from d2ctx.install.installed import BUILD_FROM_SOURCE, Installed
from d2ctx.install.isolated import ask

REPOSITORY = Path(__file__).parents[2]
WORKS: dict[str, Any] = {"error": None}


def healthy() -> Facts:
    """Return an environment in which everything works."""
    versions: dict[str, str | None] = dict.fromkeys(DISTRIBUTIONS, "1.0")
    versions |= dict.fromkeys(OPENCV_BUILDS[1:])
    versions |= {"torch": "2.15.0", "fvcore": "0.1.5.post20221221", "iopath": "0.1.9"}
    answers: dict[str, dict[str, Any]] = {name: dict(WORKS) for name in probes.PROBES}
    torch = {"cuda_devices": ["H200"], "compile": True, "triton": True, "compiler": True}
    answers["torch"] |= torch
    detectron2 = Installed(present=True, path="/d2/__init__.py", version="0.6", compiled=True)
    return Facts(python=(3, 11, 7), versions=versions, probes=answers, detectron2=detectron2)


def with_versions(**versions: str | None) -> Facts:
    named = {name.replace("_", "-"): version for name, version in versions.items()}
    facts = healthy()
    return replace(facts, versions=facts.versions | named)


def with_answer(facts: Facts, name: str, **answer: Any) -> Facts:
    return replace(facts, probes=facts.probes | {name: facts.probes[name] | answer})


def with_detectron2(**changes: Any) -> Facts:
    facts = healthy()
    return replace(facts, detectron2=replace(facts.detectron2, **changes))


PROBLEMS: dict[str, tuple[Callable[[], Facts], str]] = {
    "old python": (
        lambda: replace(healthy(), python=(3, 10, 4)),
        "make clean setup PYTHON=python3.12",
    ),
    "no numpy": (
        lambda: with_answer(
            with_versions(numpy=None), "torch", numpy_bridge="RuntimeError: Numpy is not available"
        ),
        "python -m pip install numpy",
    ),
    "no torch": (
        lambda: with_answer(with_versions(torch=None), "torch", error="ModuleNotFoundError"),
        "python -m pip install torch torchvision",
    ),
    "torch cannot load": (
        lambda: with_answer(healthy(), "torch", error="OSError: libcudart.so.13"),
        "python -m pip uninstall --yes torch torchvision && "
        "python -m pip install torch torchvision",
    ),
    "torch and numpy clash": (
        lambda: with_answer(
            healthy(), "torch", numpy_bridge="RuntimeError: Numpy is not available"
        ),
        "python -m pip install 'numpy<2'",
    ),
    "no torchvision": (
        lambda: with_versions(torchvision=None),
        "python -m pip install torch==2.15.0 torchvision",
    ),
    "torchvision for another torch": (
        lambda: with_answer(
            healthy(), "torchvision", error="RuntimeError: operator torchvision::nms does not exist"
        ),
        "python -m pip uninstall --yes torchvision && "
        "python -m pip install torch==2.15.0 torchvision",
    ),
    "torchvision operator fails": (
        lambda: with_answer(healthy(), "torchvision", roi_align="RuntimeError: no kernel"),
        "python -m pip uninstall --yes torchvision && "
        "python -m pip install torch==2.15.0 torchvision",
    ),
    "cuda operator fails": (
        lambda: with_answer(healthy(), "torch", cuda_operator="RuntimeError: no kernel image"),
        "python -m pip install --upgrade torch torchvision",
    ),
    "no opencv": (
        lambda: with_answer(
            with_versions(opencv_python_headless=None), "opencv", error="No module named 'cv2'"
        ),
        "python -m pip install opencv-python-headless",
    ),
    "opencv and numpy clash": (
        lambda: with_answer(
            healthy(), "opencv", error="ImportError: numpy.core.multiarray failed to import"
        ),
        "python -m pip install --upgrade opencv-python-headless",
    ),
    "opencv without a display": (
        lambda: with_answer(
            with_versions(opencv_python_headless=None, opencv_python="4.10"),
            "opencv",
            error="ImportError: libGL.so.1: cannot open shared object file",
        ),
        "python -m pip uninstall --yes opencv-python && "
        "python -m pip install opencv-python-headless",
    ),
    "two opencvs, broken": (
        lambda: with_answer(
            with_versions(opencv_python="4.10"), "opencv", threshold="AttributeError: threshold"
        ),
        "python -m pip uninstall --yes opencv-python-headless opencv-python && "
        "python -m pip install opencv-python-headless",
    ),
    "no pycocotools": (
        lambda: with_answer(with_versions(pycocotools=None), "pycocotools", error="No module"),
        "python -m pip install pycocotools",
    ),
    "pycocotools and numpy clash": (
        lambda: with_answer(healthy(), "pycocotools", error="ValueError: numpy.dtype size changed"),
        "python -m pip install --upgrade --force-reinstall --no-deps pycocotools",
    ),
    "faster-coco-eval fails": (
        lambda: with_answer(healthy(), "faster-coco-eval", segm="ImportError: mask_api_new_cpp"),
        "python -m pip install --upgrade --force-reinstall --no-deps faster-coco-eval",
    ),
    "no pillow": (
        lambda: with_answer(with_versions(pillow=None), "panoptic", error="No module named 'PIL'"),
        "python -m pip install pillow",
    ),
    "panoptic quality fails": (
        lambda: with_answer(healthy(), "panoptic", quality="OSError: encoder zip not available"),
        "python -m pip install --upgrade --force-reinstall pillow numpy",
    ),
    "iopath too new": (
        lambda: with_versions(iopath="0.1.10"),
        "python -m pip install 'iopath>=0.1.7,<0.1.10'",
    ),
    "fvcore too old": (
        lambda: with_versions(fvcore="0.1.3"),
        "python -m pip install 'fvcore>=0.1.5,<0.1.6'",
    ),
    "no detectron2": (lambda: with_detectron2(present=False), "python -m d2ctx.install"),
    "our older detectron2": (
        lambda: with_detectron2(metadata_version="0.5+ctxseg0"),
        "python -m d2ctx.install",
    ),
    "detectron2 for another torch": (
        lambda: with_detectron2(error="ImportError: _C.so: undefined symbol"),
        BUILD_FROM_SOURCE,
    ),
    "detectron2 too old for pillow": (
        lambda: with_detectron2(error="AttributeError: module 'PIL.Image' has no LINEAR"),
        "python -m pip uninstall --yes detectron2 && python -m d2ctx.install",
    ),
}

NOTES: dict[str, tuple[Callable[[], Facts], str | None]] = {
    "two opencvs, working": (
        lambda: with_versions(opencv_python="4.10"),
        "python -m pip uninstall --yes opencv-python-headless opencv-python && "
        "python -m pip install opencv-python-headless",
    ),
    "no cuda": (
        lambda: with_answer(
            healthy(), "torch", cuda_devices=[], cuda_operator="RuntimeError: no driver. Get one."
        ),
        None,
    ),
    "no triton": (
        lambda: with_answer(healthy(), "torch", triton=False),
        "python -m pip install triton",
    ),
    "no compiler": (lambda: with_answer(healthy(), "torch", compiler=False), None),
    "no faster-coco-eval": (
        lambda: with_answer(
            with_versions(faster_coco_eval=None), "faster-coco-eval", error="No module"
        ),
        "python -m pip install faster-coco-eval",
    ),
    "no cityscapesscripts": (
        lambda: with_answer(
            with_versions(cityscapesscripts=None), "cityscapesscripts", error="No module"
        ),
        "python -m pip install cityscapesscripts",
    ),
    "another cityscapesscripts": (
        lambda: with_answer(healthy(), "cityscapesscripts", evaluators="panoptic evaluator fails"),
        "python -m pip install cityscapesscripts==2.3.0",
    ),
    "no compiled operators": (lambda: with_detectron2(compiled=False), BUILD_FROM_SOURCE),
    "no dataset root": (
        lambda: replace(healthy(), dataset_root_exists=False),
        "export DETECTRON2_DATASETS=/path/to/your/datasets",
    ),
    "not installed itself": (
        lambda: with_versions(ctxseg=None),
        "python -m pip install -e '.[d2]'",
    ),
}


def run_with(facts: Facts, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(cli, "gather", lambda: facts)
    return cli.main(arguments)


def test_a_healthy_environment_has_no_findings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert diagnose(healthy()) == []
    assert run_with(healthy(), [], monkeypatch) == 0
    assert capsys.readouterr().out.endswith("\neverything needed works\n")


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_has_one_command_and_exit_code_1(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts, command = PROBLEMS[name][0](), PROBLEMS[name][1]
    assert [(finding.needed, finding.command) for finding in diagnose(facts)] == [(True, command)]
    assert run_with(facts, [], monkeypatch) == 1
    assert f"\n  {command}\n" in capsys.readouterr().out
    assert run_with(facts, ["--json"], monkeypatch) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"]
    assert [entry["command"] for entry in report["problems"]] == [command]


@pytest.mark.parametrize("name", NOTES)
def test_something_optional_is_a_note_and_exit_code_0(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts, command = NOTES[name][0](), NOTES[name][1]
    assert [(finding.needed, finding.command) for finding in diagnose(facts)] == [(False, command)]
    assert run_with(facts, ["--json"], monkeypatch) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert len(report["notes"]) == 1


def test_findings_that_one_command_mends_are_listed_once() -> None:
    facts = with_answer(with_versions(torch=None), "torch", error="ModuleNotFoundError")
    failing = replace(facts.detectron2, error="ModuleNotFoundError", library="torch", missing=True)
    findings = diagnose(replace(facts, detectron2=failing))
    assert [finding.what for finding in findings] == ["torch is not installed"]


def test_an_environment_without_anything_is_reported_not_crashed(tmp_path: Path) -> None:
    venv.create(tmp_path / "empty", with_pip=False, symlinks=os.name != "nt")
    folder = "Scripts" if os.name == "nt" else "bin"
    python = tmp_path / "empty" / folder / "python"
    done = subprocess.run(
        [python, "-m", "d2ctx.doctor", "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["versions"]["torch"] == "not installed"
    commands = [entry["command"] for entry in report["problems"]]
    assert commands == [
        "python -m pip install numpy",
        "python -m pip install torch torchvision",
        "python -m pip install opencv-python-headless",
        "python -m pip install pycocotools",
        "python -m pip install pillow",
        "python -m d2ctx.install",
    ]


def test_a_crash_of_the_probed_library_is_its_answer(tmp_path: Path) -> None:
    script = tmp_path / "crash.py"
    script.write_text("import os, sys; print('dying', file=sys.stderr, flush=True); os.abort()")
    assert "dying" in ask(script)["error"]
    script.write_text("import time; time.sleep(60)")
    assert "TimeoutExpired" in ask(script, timeout=0.2)["error"]


STEPS = {
    "torch": ["numpy_bridge"],
    "torchvision": ["nms", "roi_align"],
    "opencv": ["threshold"],
    "pycocotools": ["encode"],
    "faster-coco-eval": ["bbox", "segm"],
    "cityscapesscripts": ["evaluators"],
    "panoptic": ["quality"],
}


@pytest.mark.parametrize("name", probes.PROBES)
def test_the_probes_succeed_here(name: str) -> None:
    answer = probes.answer(name)
    assert answer["error"] is None
    assert {step: answer[step] for step in STEPS[name]} == dict.fromkeys(STEPS[name])


def test_a_probe_finds_our_evaluations_from_anywhere(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ask(Path(probes.__file__), "panoptic") == {"error": None, "quality": None}


def test_a_wrong_score_is_a_failure(monkeypatch) -> None:
    from d2ctx.evaluation import panoptic_files

    monkeypatch.setattr(panoptic_files, "panoptic_quality", lambda **_: {"All": {"pq": 0.5}})
    answer = probes.answer("panoptic")
    assert answer["quality"] == "ValueError: a perfect prediction gets 0.5, not 1"


def test_versions_are_read_up_to_their_suffix() -> None:
    assert release("0.1.5.post20221221") == (0, 1, 5)
    assert release("unknown") == ()
    assert complaint((3, 11, 0)) is None
    assert complaint(tuple(sys.version_info[:3])) is None
