"""Look again at an update that was dropped: `python -m d2ctx.replay RUN/nonfinite/step_N.pt`.

The model is built from the run's `config.yaml`, gets the weights, the batch and the random
generators of that update, and is watched module by module.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage

from d2ctx.errors import UserError, exit_code
from d2ctx.recovery.batches import from_plain
from d2ctx.recovery.blackbox import Box, examine, read_box
from d2ctx.recovery.updates import Before, Failure, GuardedTrainer
from d2ctx.runs import run_config
from d2ctx.trainer import Trainer

AROUND = 4  # modules that are shown on each side of the first bad one
NOT_REPRODUCED = 1


def replay(path: Path) -> tuple[list[str], bool]:
    """Do a dropped update again, on the run's device if there is one.

    Args:
        path: The file, in the folder `nonfinite` of a run.

    Returns:
        What to tell, line by line, and whether a number was not finite again.

    Raises:
        UserError: If the file or the run's configuration cannot be used.
    """
    box = read_box(path)
    cfg, lines = _on_this_machine(run_config(path.absolute().parent.parent))
    with EventStorage(box["iteration"]):
        found = examine(_trainer(cfg, box, path), _failure(box))
    return [*_then(box), *lines, *_now(found)], found["first"] is not None


def _on_this_machine(cfg: CfgNode) -> tuple[CfgNode, list[str]]:
    device = cfg.MODEL.DEVICE
    if not device.startswith("cuda") or torch.cuda.is_available():
        return cfg, []
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    return cfg, [f"{device} is not here: done again on the CPU, which rounds otherwise"]


def _trainer(cfg: CfgNode, box: Box, path: Path) -> GuardedTrainer:
    model = Trainer.build_model(cfg)
    try:
        model.load_state_dict(box["model"])
    except RuntimeError as error:
        raise UserError(
            f"{path} does not fit the run's config.yaml ({str(error).splitlines()[-1].strip()}); "
            "leave the file in the folder of its run"
        ) from error
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # never steps
    return GuardedTrainer(model, [], optimizer, amp=cfg.SOLVER.AMP.ENABLED, asked=lambda: False)


def _failure(box: Box) -> Failure:
    before = Before(generators=box["generators"], buffers={})
    return Failure(from_plain(box["batch"]), before, values=box["losses"], finite=[False])


def _then(box: Box) -> list[str]:
    losses = ", ".join(f"{name} {value:.4g}" for name, value in box["losses"].items())
    rates = ", ".join(f"{rate:.4g}" for rate in box["lr"])
    return [f"iteration {box['iteration']}: {losses}; learning rate {rates}"]


def _now(found: dict[str, Any]) -> list[str]:
    first = found["first"]
    if first is None:
        largest = max(found["largest"].items(), key=lambda item: item[1], default=("none", 0.0))
        return [
            "not reproduced: every output and gradient is finite here; the largest |output|, "
            f"{largest[1]:.4g}, is of {largest[0]}"
        ]
    lines = [f"first {first['kind']} that is not finite: {first['module']} ({first['detail']})"]
    table = found["gradients"] if first["kind"] == "gradient" else found["largest"]
    of = "gradients" if first["kind"] == "gradient" else "outputs"
    return [
        *lines,
        f"largest |value| of the {of} around it, in order of execution:",
        *_around(table, first["module"]),
    ]


def _around(table: dict[str, float], module: str) -> list[str]:
    names = list(table)
    bad = next((i for i, name in enumerate(names) if not math.isfinite(table[name])), 0)
    centre = names.index(module) if module in table else bad
    shown = names[max(centre - AROUND, 0) : centre + AROUND + 1]
    return [f"  {'>' if name == module else ' '} {table[name]:10.4g}  {name}" for name in shown]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line.

    Args:
        argv: Arguments without the program name; None takes them from the process.

    Returns:
        The exit code: 0, 1 where all numbers were finite this time, or 2 after an error that the
        user can mend.
    """
    parser = argparse.ArgumentParser(prog="python -m d2ctx.replay", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="RUN/nonfinite/step_N.pt")
    path = parser.parse_args(argv).file
    reproduced = []

    def program() -> None:
        lines, again = replay(path)
        reproduced.append(again)
        print("\n".join(lines))

    return exit_code(program) or (0 if reproduced[0] else NOT_REPRODUCED)


if __name__ == "__main__":
    sys.exit(main())
