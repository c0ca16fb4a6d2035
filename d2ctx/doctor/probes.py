"""Script: try one library and print, as one line of JSON, what works.

A value of None means that the step worked; otherwise the value says why it did not. Nothing is
needed but the library, and for the evaluations the files beside this one.
"""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
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


def probe_faster_coco_eval() -> dict[str, Any]:
    """Import the fast COCO evaluation and score a box and a mask that are right."""
    import faster_coco_eval

    from d2ctx.evaluation.coco_scores import CocoApi, average_precision

    mask = {"size": [8, 8], "counts": "b04400000>"}  # run lengths of the box
    square = {"bbox": [2, 2, 4, 4], "segmentation": mask, "area": 16}
    truth = {
        "images": [{"id": 1, "height": 8, "width": 8}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, **square}],
        "categories": [{"id": 1, "name": "square"}],
    }
    found = [{"image_id": 1, "category_id": 1, "score": 0.9, **square}]
    api = CocoApi("faster-coco-eval", faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster)

    def score(task: str) -> None:
        ap = average_precision(truth, found, task=task, api=api).statistics["AP"]
        _expect(ap, 100)

    return {task: attempt(lambda task=task: score(task)) for task in ("bbox", "segm")}


def probe_cityscapesscripts() -> dict[str, Any]:
    """Import cityscapesScripts and run its evaluators on an image that is right."""
    import cityscapesscripts  # noqa: F401 - that it is there comes first

    from d2ctx.evaluation.cityscapes_official import rehearse

    # What to install is the diagnosis' to say.
    return {"evaluators": "; ".join(line.partition(";")[0] for line in rehearse()) or None}


def probe_panoptic() -> dict[str, Any]:
    """Write and read a PNG of segment ids, and score a prediction that is right."""
    import numpy

    from d2ctx.evaluation.panoptic_files import panoptic_quality, write_ids

    ids = numpy.full((8, 8), 70_000)
    segment = {"id": 70_000, "category_id": 1, "area": 64, "iscrowd": 0}
    image = {"image_id": 1, "file_name": "1.png", "segments_info": [segment]}
    content = {"annotations": [image], "categories": [{"id": 1, "name": "a", "isthing": 1}]}

    def score() -> None:
        with TemporaryDirectory(prefix="panoptic-") as folder:
            write_ids(Path(folder, "1.png"), ids)
            sides = {"truth": content, "predicted": content}
            roots = {"truth_root": Path(folder), "predicted_root": Path(folder)}
            _expect(panoptic_quality(**sides, **roots)["All"]["pq"], 1)

    return {"quality": attempt(score)}


def _expect(score: float, perfect: float) -> None:
    if abs(score - perfect) > 1e-6:
        raise ValueError(f"a perfect prediction gets {score}, not {perfect}")


PROBES = {
    "torch": probe_torch,
    "torchvision": probe_torchvision,
    "opencv": probe_opencv,
    "pycocotools": probe_pycocotools,
    "faster-coco-eval": probe_faster_coco_eval,
    "cityscapesscripts": probe_cityscapesscripts,
    "panoptic": probe_panoptic,
}


def answer(name: str) -> dict[str, Any]:
    """Run one probe; its import error, if any, is under the key `error`."""
    found: dict[str, Any] = {}
    error = attempt(lambda: found.update(PROBES[name]()))
    return {"error": error, **found}


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[2]))  # last: only for d2ctx, where not installed
    print("\n" + json.dumps(answer(sys.argv[1])))
