"""Script: try one library and print, as one line of JSON, what works. Needs nothing else.

A value of None means that the step worked; otherwise the value says why it did not.
"""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from typing import Any


def attempt(step: Callable[[], object]) -> str | None:
    """Run one step; return None, or the error in one line."""
    try:
        step()
    except BaseException as error:  # whatever it is, it is the answer
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None


def probe_torch() -> dict[str, Any]:
    """Import PyTorch, run an operator, and look at CUDA and at what torch.compile needs."""
    import torch

    def multiply_on_cuda() -> None:
        square = torch.ones(4, 4, device="cuda")
        square.mm(square).sum().item()

    count = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    compilers = ("c++", "g++", "clang++", "cl")
    return {
        "numpy_bridge": attempt(lambda: torch.ones(2).numpy()),
        "cuda_build": torch.version.cuda,
        "cuda_devices": [torch.cuda.get_device_name(index) for index in count],
        "cuda_operator": attempt(multiply_on_cuda),
        "compile": hasattr(torch, "compile"),
        "triton": importlib.util.find_spec("triton") is not None,
        "compiler": any(shutil.which(name) for name in compilers),
    }


def probe_torchvision() -> dict[str, Any]:
    """Run torchvision's two operators that Detectron2 cannot do without, on the CPU."""
    import torch
    from torchvision.ops import nms, roi_align

    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.9]])
    scores = torch.tensor([0.9, 0.8])
    maps = torch.ones(1, 1, 8, 8)
    return {
        "nms": attempt(lambda: nms(boxes, scores, 0.5)),
        "roi_align": attempt(lambda: roi_align(maps, [boxes], (2, 2), aligned=True)),
    }


def probe_opencv() -> dict[str, Any]:
    """Import OpenCV and pass it an array."""
    import cv2
    import numpy

    image = numpy.zeros((4, 4), numpy.uint8)
    return {"threshold": attempt(lambda: cv2.threshold(image, 1, 2, cv2.THRESH_BINARY))}


def probe_pycocotools() -> dict[str, Any]:
    """Import the COCO tools and encode a mask."""
    import numpy
    from pycocotools import cocoeval, mask

    image = numpy.zeros((4, 4, 1), numpy.uint8, order="F")
    return {"encode": attempt(lambda: mask.encode(image)), "cocoeval": cocoeval.__name__}


PROBES = {
    "torch": probe_torch,
    "torchvision": probe_torchvision,
    "opencv": probe_opencv,
    "pycocotools": probe_pycocotools,
}


def answer(name: str) -> dict[str, Any]:
    """Run one probe; its import error, if any, is under the key `error`."""
    found: dict[str, Any] = {}
    error = attempt(lambda: found.update(PROBES[name]()))
    return {"error": error, **found}


if __name__ == "__main__":
    print("\n" + json.dumps(answer(sys.argv[1])))
