"""Gather what the diagnosis needs to know; every part that cannot be learned says so."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from d2ctx.doctor.probes import PROBES
from d2ctx.install.installed import Installed, probe
from d2ctx.install.isolated import ask

_SCRIPT = Path(__file__).with_name("probes.py")

OPENCV_BUILDS = (
    "opencv-python-headless",
    "opencv-python",
    "opencv-contrib-python-headless",
    "opencv-contrib-python",
)
DISTRIBUTIONS = (
    "torch",
    "torchvision",
    "numpy",
    "pillow",
    *OPENCV_BUILDS,
    "pycocotools",
    "faster-coco-eval",
    "cityscapesscripts",
    "fvcore",
    "iopath",
    "detectron2",
    "ctxseg",
)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The environment as found.

    Args:
        python: Major, minor and micro number of this interpreter.
        versions: Distribution -> version, or None when it is not installed.
        probes: Probe -> its answer; the key `error` says why it could not run at all.
        detectron2: What importing Detectron2 gave.
        dataset_root: The folder below which Detectron2 looks for datasets.
        dataset_root_exists: Whether it is there.
    """

    python: tuple[int, int, int]
    versions: dict[str, str | None]
    probes: dict[str, dict[str, Any]] = field(default_factory=dict)
    detectron2: Installed
    dataset_root: str = "datasets"
    dataset_root_exists: bool = True

    def outcome(self, name: str, *steps: str) -> str | None:
        """Return None when these steps of a probe worked, else why the first failed."""
        answer = self.probes[name]
        errors = [answer.get(step) for step in ("error", *steps)]
        return next((str(error) for error in errors if error), None)


def version_of(distribution: str) -> str | None:
    """Return the version of an installed distribution, without importing it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def gather() -> Facts:
    """Probe this environment, each library in an interpreter of its own."""
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    with ThreadPoolExecutor(max_workers=2) as pool:
        pending = {name: pool.submit(ask, _SCRIPT, name) for name in PROBES}
        detectron2 = probe()
        probes = {name: future.result() for name, future in pending.items()}
    return Facts(
        python=(sys.version_info.major, sys.version_info.minor, sys.version_info.micro),
        versions={name: version_of(name) for name in DISTRIBUTIONS},
        probes=probes,
        detectron2=detectron2,
        dataset_root=root,
        dataset_root_exists=Path(root).expanduser().is_dir(),
    )
