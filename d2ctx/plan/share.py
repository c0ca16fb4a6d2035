"""What one process of a run does: its part of the batch, and the settings after scaling.

Detectron2 scales batch, learning rate and schedule linearly to the number of processes where
`SOLVER.REFERENCE_WORLD_SIZE` says for how many they were written.
"""

from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from d2ctx.wording import plural


@dataclass(frozen=True)
class Share:
    """The part of one process.

    Attributes:
        cfg: Of the run, as its processes have it after scaling.
        written: As the file has it.
        processes: How many.
    """

    cfg: CfgNode
    written: CfgNode
    processes: int

    @property
    def images(self) -> int:
        """Images of a batch in one process."""
        return self.cfg.SOLVER.IMS_PER_BATCH // self.processes

    def facts(self) -> dict[str, Any]:
        """Numbers by name."""
        solver = self.cfg.SOLVER
        return {
            "processes": self.processes,
            "global_batch": solver.IMS_PER_BATCH,
            "images_per_process": self.images,
            "lr": solver.BASE_LR,
            "iterations": solver.MAX_ITER,
        }

    def lines(self) -> list[str]:
        """The same for people, and where the numbers come from."""
        solver, written = self.cfg.SOLVER, self.written.SOLVER
        batch = (
            f"batch {solver.IMS_PER_BATCH} = {plural(self.processes, 'process')} x "
            f"{plural(self.images, 'image')}, {plural(solver.MAX_ITER, 'iteration')}"
        )
        reference = written.REFERENCE_WORLD_SIZE
        if reference in (0, self.processes):
            why = (
                "nothing is scaled: SOLVER.REFERENCE_WORLD_SIZE is 0"
                if not reference
                else f"written for {plural(reference, 'process')}, as many as there are"
            )
            return [batch, f"learning rate {solver.BASE_LR:g} ({why})"]
        return [
            batch,
            f"learning rate {solver.BASE_LR:g}: written for {plural(reference, 'process')} "
            f"(SOLVER.REFERENCE_WORLD_SIZE) as {written.BASE_LR:g} with batch "
            f"{written.IMS_PER_BATCH} and {plural(written.MAX_ITER, 'iteration')}, scaled linearly",
        ]


def share_of(cfg: CfgNode, processes: int) -> Share:
    """Scale a configuration as the run's trainers will.

    Args:
        cfg: Whose batch can be divided.
        processes: How many the run will have.

    Returns:
        The share of one of them.
    """
    return Share(DefaultTrainer.auto_scale_workers(cfg, processes), cfg, processes)


def rehearsed(share: Share, *, output: str, weights: str) -> CfgNode:
    """The configuration of the rehearsal: one process, nothing due but the updates.

    Args:
        share: Of the run.
        output: Folder of the rehearsal.
        weights: What it starts from.

    Returns:
        One that gives the same updates as this share of the run.
    """
    cfg = share.cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS = output, weights
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 0
    cfg.SOLVER.IMS_PER_BATCH = share.images
    cfg.SOLVER.CHECKPOINT_PERIOD = cfg.SOLVER.MAX_ITER + 1
    cfg.SOLVER.ON_NONFINITE = "stop"
    cfg.DATASETS.TEST = ()
    cfg.TEST.EVAL_PERIOD = 0
    cfg.TEST.EXPECTED_RESULTS = []
    cfg.freeze()
    return cfg
