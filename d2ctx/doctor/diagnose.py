"""From facts to findings: what is broken, what is merely missing, and the command for each."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from d2ctx.doctor.facts import OPENCV_BUILDS, Facts
from d2ctx.doctor.python_version import complaint
from d2ctx.install.installed import BUILD_FROM_SOURCE

_INSTALL = "python -m pip install"
_UNINSTALL = "python -m pip uninstall --yes"

# The ranges that Detectron2 0.5, 0.6 and main all ask for: lowest allowed, first not allowed.
RANGES = {"fvcore": ((0, 1, 5), (0, 1, 6)), "iopath": ((0, 1, 7), (0, 1, 10))}

# Import name -> the probes that try this library. A torchvision that was built for another torch
# fails inside torch.
_PROBES_OF = {
    "torch": ("torch", "torchvision"),
    "torchvision": ("torchvision",),
    "cv2": ("opencv",),
    "pycocotools": ("pycocotools",),
}

# The version that our stand-ins were tested with.
TESTED_CITYSCAPES = "2.3.0"

_NUMPY_CLASH = r"_ARRAY_API|numpy\.core\.multiarray|dtype size changed|compiled using NumPy"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing to know.

    Args:
        what: One sentence.
        command: The one command that changes it, or None when there is nothing to run.
        needed: True for a problem, False for a note about something optional.
    """

    what: str
    command: str | None
    needed: bool


def problem(what: str, command: str) -> Finding:
    """Return a finding about something that has to work."""
    return Finding(what=what, command=command, needed=True)


def note(what: str, command: str | None = None) -> Finding:
    """Return a finding about something optional."""
    return Finding(what=what, command=command, needed=False)


def check_python(facts: Facts) -> Iterator[Finding]:
    """Python itself."""
    found = complaint(facts.python)
    if found:
        yield problem(*found)


def check_numpy(facts: Facts) -> Iterator[Finding]:
    """NumPy, without which nothing else works."""
    if facts.versions["numpy"] is None:
        yield problem("numpy is not installed", f"{_INSTALL} numpy")


def check_torch(facts: Facts) -> Iterator[Finding]:
    """PyTorch, and its bridge to NumPy."""
    if facts.versions["torch"] is None:
        yield problem("torch is not installed", f"{_INSTALL} torch torchvision")
        return
    error = facts.probes["torch"].get("error")
    if error:
        command = f"{_UNINSTALL} torch torchvision && {_INSTALL} torch torchvision"
        yield problem(f"torch cannot be imported: {error}", command)
        return
    bridge = facts.outcome("torch", "numpy_bridge")
    if bridge and facts.versions["numpy"] is not None:
        what = f"torch was built for another NumPy than {facts.versions['numpy']}: {bridge}"
        yield problem(what, f"{_INSTALL} 'numpy<2'")


def check_torchvision(facts: Facts) -> Iterator[Finding]:
    """torchvision, whose operators fail when it was built for another torch."""
    torch = facts.versions["torch"]
    if torch is None:
        return
    same_torch = f"{_INSTALL} torch=={torch.partition('+')[0]} torchvision"
    if facts.versions["torchvision"] is None:
        yield problem("torchvision is not installed", same_torch)
        return
    if facts.probes["torch"].get("error"):
        return
    for step in ("nms", "roi_align"):
        error = facts.outcome("torchvision", step)
        if error:
            what = (
                f"torchvision {facts.versions['torchvision']} does not fit torch {torch}, "
                f"{step} fails: {error}"
            )
            yield problem(what, f"{_UNINSTALL} torchvision && {same_torch}")
            return


def check_cuda(facts: Facts) -> Iterator[Finding]:
    """CUDA: optional, but a device that is visible has to work."""
    torch = facts.probes["torch"]
    if torch.get("error"):
        return
    devices = torch.get("cuda_devices", [])
    if not devices:
        reason = str(torch.get("cuda_operator")).split(". ")[0]
        yield note(f"everything runs on the CPU, because no CUDA device is usable: {reason}")
    elif torch.get("cuda_operator"):
        what = f"{devices[0]} is visible but an operator fails: {torch['cuda_operator']}"
        yield problem(what, f"{_INSTALL} --upgrade torch torchvision")


def check_compile(facts: Facts) -> Iterator[Finding]:
    """What torch.compile needs; it is optional."""
    torch = facts.probes["torch"]
    if torch.get("error"):
        return
    if torch.get("cuda_devices") and not torch.get("triton"):
        yield note("triton is missing, so torch.compile cannot use the GPU", f"{_INSTALL} triton")
    if not torch.get("compiler"):
        yield note("no C++ compiler was found, so torch.compile cannot use the CPU")


def check_opencv(facts: Facts) -> Iterator[Finding]:
    """OpenCV, of which one build at most may be installed."""
    builds = [name for name in OPENCV_BUILDS if facts.versions.get(name)]
    error = facts.outcome("opencv", "threshold")
    replace = f"{_UNINSTALL} {' '.join(builds)} && {_INSTALL} opencv-python-headless"
    if len(builds) > 1:
        what = f"{' and '.join(builds)} overwrite each other's files"
        yield problem(f"{what}; now: {error}", replace) if error else note(what, replace)
    elif error and not builds:
        yield problem(f"OpenCV is not installed: {error}", f"{_INSTALL} opencv-python-headless")
    elif error and facts.versions["numpy"] is None:
        return
    elif error and re.search(_NUMPY_CLASH, error):
        what = f"{builds[0]} was built for another NumPy than {facts.versions['numpy']}: {error}"
        yield problem(what, f"{_INSTALL} --upgrade {builds[0]}")
    elif error:
        yield problem(f"{builds[0]} is installed but fails: {error}", replace)


def check_pycocotools(facts: Facts) -> Iterator[Finding]:
    """The COCO tools, which Detectron2 imports for masks."""
    error = facts.outcome("pycocotools", "encode")
    if error and facts.versions["pycocotools"] is None:
        yield problem(f"pycocotools is not installed: {error}", f"{_INSTALL} pycocotools")
    elif error and facts.versions["numpy"] is not None:
        command = f"{_INSTALL} --upgrade --force-reinstall --no-deps pycocotools"
        yield problem(f"pycocotools is installed but fails: {error}", command)


def check_faster_coco_eval(facts: Facts) -> Iterator[Finding]:
    """The fast COCO evaluation: optional, but where it is installed it is used."""
    name = "faster-coco-eval"
    error = facts.outcome(name, "bbox", "segm")
    if error and facts.versions[name] is None:
        what = f"{name} is not installed, so pycocotools scores boxes and masks, which takes longer"
        yield note(what, f"{_INSTALL} {name}")
    elif error and facts.versions["numpy"] is not None:
        command = f"{_INSTALL} --upgrade --force-reinstall --no-deps {name}"
        yield problem(f"{name} is installed but fails: {error}", command)


def check_cityscapes(facts: Facts) -> Iterator[Finding]:
    """cityscapesScripts, whose code scores Cityscapes; nothing else needs it."""
    name = "cityscapesscripts"
    error = facts.outcome(name, "evaluators")
    if error and facts.versions[name] is None:
        yield note(f"{name} is not installed, so Cityscapes is not scored", f"{_INSTALL} {name}")
    elif error and facts.versions["numpy"] is not None:
        what = f"{name} is installed but fails, so Cityscapes is not scored: {error}"
        yield note(what, f"{_INSTALL} {name}=={TESTED_CITYSCAPES}")


def check_panoptic(facts: Facts) -> Iterator[Finding]:
    """PNGs of segment ids, and panoptic quality, which need Pillow."""
    error = facts.outcome("panoptic", "quality")
    if facts.versions["pillow"] is None:
        yield problem("Pillow is not installed, which reads images", f"{_INSTALL} pillow")
    elif error and facts.versions["numpy"] is not None:
        what = f"panoptic predictions cannot be written and scored: {error}"
        yield problem(what, f"{_INSTALL} --upgrade --force-reinstall pillow numpy")


def release(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: 0.1.5.post2022 -> (0, 1, 5)."""
    digits = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in digits[0].split(".")) if digits else ()


def check_ranges(facts: Facts) -> Iterator[Finding]:
    """Versions of fvcore and iopath, which change their interfaces between small versions."""
    if not facts.detectron2.present:
        return
    for name, (lowest, end) in RANGES.items():
        found = facts.versions[name]
        if found is not None and lowest <= release(found) < end:
            continue
        lower, upper = (".".join(str(part) for part in bound) for bound in (lowest, end))
        got = "none" if found is None else found
        what = f"Detectron2 needs {name} from {lower} to before {upper}, got {got}"
        yield problem(what, f"{_INSTALL} '{name}>={lower},<{upper}'")


def check_detectron2(facts: Facts) -> Iterator[Finding]:
    """Detectron2 itself."""
    found = facts.detectron2
    if not found.present:
        yield problem("Detectron2 is not installed", "python -m d2ctx.install")
    elif found.outdated:
        yield problem(f"{found.describe()} is an older repackaging", "python -m d2ctx.install")
    elif not found.works:
        causes = _PROBES_OF.get(str(found.library), ())
        # A library that fails by itself is reported, with what to do, by its own check.
        if not any(facts.probes[name].get("error") for name in causes):
            yield problem(f"{found.describe()} fails: {found.error}", found.remedy())
    elif not found.compiled:
        what = (
            "Detectron2's compiled operators are missing: no deformable convolution on the GPU, "
            "no rotated boxes, no compiled COCO evaluator"
        )
        yield note(what, BUILD_FROM_SOURCE)


def check_extras(facts: Facts) -> Iterator[Finding]:
    """What is convenient: a dataset root, this project as a distribution."""
    if not facts.dataset_root_exists:
        what = f"the dataset root {facts.dataset_root} does not exist"
        yield note(what, "export DETECTRON2_DATASETS=/path/to/your/datasets")
    if facts.versions["ctxseg"] is None:
        yield note("ctxseg runs from a folder and is not installed", f"{_INSTALL} -e '.[d2]'")


CHECKS = (
    check_python,
    check_numpy,
    check_torch,
    check_torchvision,
    check_cuda,
    check_compile,
    check_opencv,
    check_pycocotools,
    check_faster_coco_eval,
    check_cityscapes,
    check_panoptic,
    check_ranges,
    check_detectron2,
    check_extras,
)


def diagnose(facts: Facts) -> list[Finding]:
    """Run all checks.

    Args:
        facts: The environment as found.

    Returns:
        The findings in the order in which to mend things; of several that one command mends, the
        first, because the others follow from it.
    """
    findings: dict[str, Finding] = {}
    for finding in (finding for check in CHECKS for finding in check(facts)):
        findings.setdefault(finding.command or finding.what, finding)
    return list(findings.values())
