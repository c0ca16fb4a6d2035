"""`segtrain doctor`: what works on this machine, and the command that mends what does not."""

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

_INSTALL = f"{Path(sys.executable).name} -m pip install"
_GIB = 1 << 30

# Package -> the lowest version that is known to work; `requirements.txt` and the extra `seg`.
NEEDED = {
    "torch": "2.8",
    "torchvision": "0.23",
    "numpy": "2.0",
    "pillow": "10.1",
    "cityscapesscripts": "2.2",
    "matplotlib": "3.8",
    "opencv-python-headless": "4.8",
    "pydantic": "2.7",
    "pyyaml": "6",
    "rich": "13",
    "safetensors": "0.4",
    "timm": "1.0",
}
_OPTIONAL = {"tensorboard": "train.tensorboard"}
# Packages that stand in for another one.
_SAME = {"opencv-python-headless": ("opencv-python", "opencv-contrib-python")}

_EPILOG = """exit code: 0 when everything needed works, 1 otherwise

examples:
  segtrain doctor
  segtrain doctor --json
"""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Args:
        name: What it is.
        value: What was found.
        state: A problem is something needed that does not work, a note may matter.
        fix: The command or the words that change it.
    """

    name: str
    value: str
    state: Literal["ok", "note", "problem"] = "ok"
    fix: str | None = None


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `doctor`.

    Args:
        commands: The sub-parsers of the main parser.
    """
    parser = commands.add_parser(
        "doctor",
        help="say what works on this machine",
        description="Say what works on this machine, and which command mends what does not.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `doctor`.

    Args:
        args: Parsed arguments.

    Returns:
        0 when everything needed works, else 1.
    """
    findings = examine()
    healthy = all(finding.state != "problem" for finding in findings)
    if args.json:
        rows = [asdict(finding) for finding in findings]
        print(json.dumps({"ok": healthy, "findings": rows}, indent=2))
    else:
        print("\n".join(_lines(findings)))
    return 0 if healthy else 1


def examine() -> list[Finding]:
    """Look at everything; what fails becomes a problem, never an error."""
    return [*_packages(), *(_tried(name, trial) for name, trial in TRIALS.items()), *_machine()]


def _lines(findings: list[Finding]) -> Iterator[str]:
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mark = "" if finding.state == "ok" else f"  [{finding.state}]"
        yield f"{finding.name:<{width}}  {finding.value}{mark}"
        if finding.fix:
            yield f"{'':<{width}}  -> {finding.fix}"
    problems = sum(finding.state == "problem" for finding in findings)
    yield ""
    yield "everything needed works" if not problems else f"problems: {problems}"


def _packages() -> Iterator[Finding]:
    yield Finding(name="python", value=".".join(str(part) for part in sys.version_info[:3]))
    for package, lowest in NEEDED.items():
        version = next(filter(None, map(_version, (package, *_SAME.get(package, ())))), None)
        if version is None:
            fix = f"{_INSTALL} '{package}>={lowest}'"
            yield Finding(name=package, value="not installed", state="problem", fix=fix)
        elif _numbers(version) < _numbers(lowest):
            fix = f"{_INSTALL} --upgrade '{package}>={lowest}'"
            yield Finding(name=package, value=version, state="problem", fix=fix)
        else:
            yield Finding(name=package, value=version)
    for package, use in _OPTIONAL.items():
        version = _version(package)
        fix = None if version else f"only for {use}: {_INSTALL} {package}"
        yield Finding(name=package, value=version or "not installed", fix=fix)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _torch_works() -> str:
    import torch

    torch.ones(2, 2) @ torch.ones(2, 2)
    torch.ones(2).numpy()
    return "multiplies matrices, talks to numpy"


def _torchvision_works() -> str:
    import torch
    from torchvision.ops import nms

    nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)
    return "its operators fit torch"


def _opencv_works() -> str:
    import cv2
    import numpy as np

    written, data = cv2.imencode(".png", np.zeros((2, 2, 3), np.uint8))
    if not written or cv2.imdecode(data, cv2.IMREAD_COLOR) is None:
        raise RuntimeError("it cannot write and read a PNG")
    return "writes and reads pictures"


def _cuda_works() -> str:
    import torch

    names = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    if not names:
        return "none; everything runs on the CPU, slowly"
    (torch.ones(2, 2, device="cuda") @ torch.ones(2, 2, device="cuda")).sum().item()
    bf16 = "with" if torch.cuda.is_bf16_supported() else "without"
    memory = torch.cuda.get_device_properties(0).total_memory / _GIB
    return f"{', '.join(names)}; {memory:.0f} GiB, {bf16} bf16"


def _several_processes() -> str:
    import torch.distributed as dist

    if not dist.is_available():
        return "this torch has no torch.distributed; one process only"
    backends = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    return ", ".join(name for name, here in backends.items() if here) or "no backend"


def _compile() -> str:
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    return f"C++ compiler {compiler}; not tried" if compiler else "no C++ compiler found"


_FORCE = "--force-reinstall"
TRIALS: dict[str, Callable[[], str]] = {
    "torch works": _torch_works,
    "torchvision works": _torchvision_works,
    "OpenCV works": _opencv_works,
    "CUDA devices": _cuda_works,
    "distributed": _several_processes,
    "torch.compile": _compile,
}
_FIXES = {
    "torch works": f"{_INSTALL} {_FORCE} torch torchvision",
    "torchvision works": f"{_INSTALL} {_FORCE} torch torchvision",
    "OpenCV works": f"{_INSTALL} {_FORCE} opencv-python-headless",
    "CUDA devices": "update the driver, or hide the devices: CUDA_VISIBLE_DEVICES=",
}


def _tried(name: str, trial: Callable[[], str]) -> Finding:
    try:
        return Finding(name=name, value=trial())
    except Exception as error:  # whatever a broken installation throws is what we report
        said = " ".join(str(error).split())[:200]
        value = f"{type(error).__name__}: {said}"
        return Finding(name=name, value=value, state="problem", fix=_FIXES.get(name))


def _machine() -> Iterator[Finding]:
    affinity = getattr(os, "sched_getaffinity", None)  # Windows and macOS have none
    cores = len(affinity(0)) if affinity else os.cpu_count()
    yield Finding(name="CPU cores", value=str(cores))
    free = shutil.disk_usage(".").free / _GIB
    low = free < 5
    yield Finding(
        name="free disk here",
        value=f"{free:.1f} GiB",
        state="note" if low else "ok",
        fix="checkpoints are large; set output to another disk" if low else None,
    )
    shared = Path("/dev/shm")  # through it the workers hand over their images
    if shared.is_dir():
        free = shutil.disk_usage(shared).free / _GIB
        low = free < 1
        yield Finding(
            name="shared memory",
            value=f"{free:.1f} GiB",
            state="note" if low else "ok",
            fix="in a container: docker run --shm-size=8g, or data.workers=0" if low else None,
        )
