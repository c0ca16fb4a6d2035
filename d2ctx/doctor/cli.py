"""Command line of the doctor: print the facts, the problems and the command for each."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from d2ctx.doctor.diagnose import Finding, diagnose
from d2ctx.doctor.facts import OPENCV_BUILDS, Facts, gather


def capabilities(facts: Facts) -> dict[str, str]:
    """Return what can be done here, in words: every line states what was tried."""

    def tried(name: str, *steps: str) -> str:
        error = facts.outcome(name, *steps)
        return "works" if error is None else f"fails: {error}"

    torch = facts.probes["torch"]
    devices = torch.get("cuda_devices", [])
    detectron2 = facts.detectron2
    broken = "" if detectron2.works else f", fails: {detectron2.error}"
    root = "exists" if facts.dataset_root_exists else "does not exist"
    return {
        "Detectron2": detectron2.describe() + broken if detectron2.present else "not installed",
        "compiled operators": "yes" if detectron2.compiled else "no",
        "torchvision nms, CPU": tried("torchvision", "nms"),
        "torchvision roi_align, CPU": tried("torchvision", "roi_align"),
        "CUDA devices": ", ".join(devices) or "none",
        "CUDA operator": tried("torch", "cuda_operator") if devices else "not tried",
        "torch.compile": _compile(torch),
        "OpenCV": tried("opencv", "threshold"),
        "pycocotools": tried("pycocotools", "encode"),
        "faster-coco-eval": tried("faster-coco-eval", "bbox", "segm"),
        "Cityscapes evaluation": tried("cityscapesscripts", "evaluators"),
        "panoptic quality": tried("panoptic", "quality"),
        "dataset root": f"{facts.dataset_root} ({root})",
    }


def _compile(torch: dict[str, Any]) -> str:
    parts = {
        "torch.compile": torch.get("compile"),
        "triton": torch.get("triton"),
        "a C++ compiler": torch.get("compiler"),
    }
    here = [name for name, found in parts.items() if found]
    return f"found {', '.join(here)}; not tried" if here else "not found"


def shown_versions(facts: Facts) -> dict[str, str]:
    """Return name -> version; of the builds of OpenCV only those that are there."""
    builds = [f"{name} {facts.versions[name]}" for name in OPENCV_BUILDS if facts.versions[name]]
    shown = {"python": ".".join(str(part) for part in facts.python)}
    for name, version in facts.versions.items():
        if name == OPENCV_BUILDS[0]:
            shown["opencv"] = ", ".join(builds) or "not installed"
        elif name not in OPENCV_BUILDS:
            shown[name] = version or "not installed"
    return shown


def as_text(facts: Facts, findings: list[Finding]) -> str:
    """Return the report for people."""
    rows = [*shown_versions(facts).items(), *capabilities(facts).items()]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    for title, needed in (("problem", True), ("note", False)):
        for finding in findings:
            if finding.needed == needed:
                lines += ["", f"{title}: {finding.what}"]
                lines += [f"  {finding.command}"] if finding.command else []
    problems = sum(finding.needed for finding in findings)
    verdict = "everything needed works" if not problems else f"{problems} problem(s) to mend"
    return "\n".join([*lines, "", verdict])


def as_json(facts: Facts, findings: list[Finding]) -> str:
    """Return the report for programs."""
    groups = {"problems": True, "notes": False}
    listed = {
        group: [
            {"what": finding.what, "command": finding.command}
            for finding in findings
            if finding.needed == needed
        ]
        for group, needed in groups.items()
    }
    content = {
        "ok": not listed["problems"],
        "versions": shown_versions(facts),
        "capabilities": capabilities(facts),
        "executable": sys.executable,
        **listed,
    }
    return json.dumps(content, indent=2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the doctor.

    Args:
        argv: Command-line arguments; the process's own by default.

    Returns:
        0 when everything needed works, 1 when something needed is broken.
    """
    parser = argparse.ArgumentParser(prog="python -m d2ctx.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    facts = gather()
    findings = diagnose(facts)
    print(as_json(facts, findings) if arguments.json else as_text(facts, findings))
    return 1 if any(finding.needed for finding in findings) else 0
