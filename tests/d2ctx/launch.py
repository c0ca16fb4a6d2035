"""Training runs of a few iterations on toy data, started as the command line starts them."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.utils.logger import setup_logger

from d2ctx import train_net
from tests.d2ctx.tiny import CONFIGS
from tests.d2ctx.toy_coco import CLASSES, ToySet, write_toy

MAX_ITER = 5


@dataclass(frozen=True)
class Launch:
    """A configuration file over two toy sets."""

    config: Path
    output: Path
    train: ToySet
    val: ToySet

    def main(self, *args: object) -> int:
        """Exit code of `projects/train_net.py --config-file ... args`."""
        return train_net.main(["--config-file", str(self.config), *map(str, args)])

    def results(self, output: Path | None = None) -> dict[str, Any]:
        return json.loads(((output or self.output) / "results.json").read_text())

    def detections(self, output: Path | None = None) -> list[dict[str, Any]]:
        folder = (output or self.output) / "inference" / self.val.name
        return json.loads((folder / "coco_instances_results.json").read_text())


def write_launch(folder: Path) -> Launch:
    """A Mask R-CNN with A²-FPN that trains for `MAX_ITER` iterations in a second."""
    output = folder / "run"
    train = write_toy(folder / "data", "toy_train", images=4)
    val = write_toy(folder / "data", "toy_val", images=2)
    config = {
        "_BASE_": str(CONFIGS / "a2fpn" / "mask_rcnn_a2fpn_instant.yaml"),
        "MODEL": {
            "RPN": {"POST_NMS_TOPK_TRAIN": 20, "POST_NMS_TOPK_TEST": 20},
            "ROI_HEADS": {"NUM_CLASSES": len(CLASSES), "BATCH_SIZE_PER_IMAGE": 16},
        },
        "INPUT": {"MIN_SIZE_TRAIN": [64], "MIN_SIZE_TEST": 64},
        "DATASETS": {
            "COCO_FORMAT": {
                toy.name: {"JSON": str(toy.json_file), "IMAGES": str(toy.image_root)}
                for toy in (train, val)
            },
            "TRAIN": [train.name],
            "TEST": [val.name],
        },
        "SOLVER": {"MAX_ITER": MAX_ITER, "STEPS": [4], "WARMUP_ITERS": 3},
        "TEST": {"DETECTIONS_PER_IMAGE": 5},
        "OUTPUT_DIR": str(output),
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return Launch(path, output, train, val)


@contextmanager
def restored_loggers() -> Iterator[None]:
    """Take away what was set up inside: handlers hold this test's terminal, levels let more in."""
    loggers = [logging.getLogger(name) for name in ("fvcore", "detectron2", "d2ctx")]
    before = [(logger, logger.level, logger.propagate) for logger in loggers]
    try:
        yield
    finally:
        for logger, level, propagate in before:
            for handler in list(logger.handlers):
                logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate
        setup_logger.cache_clear()
