"""Checks of the configuration against this machine: devices, batch, folders, weights."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from detectron2.config import CfgNode

from d2ctx.optimizer import FULL_MODEL, OPTIMIZERS
from d2ctx.preflight.findings import Findings
from d2ctx.recovery.nonfinite import POLICIES
from d2ctx.wording import did_you_mean

LAST_CHECKPOINT = "last_checkpoint"  # Detectron2's file that names the newest checkpoint
CLIP_TYPES = (FULL_MODEL, "norm", "value")  # the last two are Detectron2's


def check_devices(cfg: CfgNode, *, num_gpus: int, findings: Findings) -> None:
    """Check that the device exists, and as many as the command asks for."""
    device = cfg.MODEL.DEVICE
    if not device.startswith("cuda"):
        if num_gpus > 1:
            findings.errors.append(
                f"--num-gpus {num_gpus} needs GPUs, but MODEL.DEVICE is {device}; "
                "set --num-gpus 1, or MODEL.DEVICE cuda"
            )
        return
    if not torch.cuda.is_available():
        findings.errors.append(
            f"MODEL.DEVICE is {device}, but no CUDA device is available here; "
            "add MODEL.DEVICE cpu to the command"
        )
        return
    present, index = torch.cuda.device_count(), _device_index(device)
    if num_gpus > present:
        findings.errors.append(
            f"--num-gpus {num_gpus} is more than the {present} present; set --num-gpus {present}"
        )
    if index >= present:
        findings.errors.append(
            f"MODEL.DEVICE is {device}, but the last device here is cuda:{present - 1}; "
            "set MODEL.DEVICE cuda"
        )


def _device_index(device: str) -> int:
    index = device.partition(":")[2]
    return int(index) if index.isdigit() else 0


def check_batch(cfg: CfgNode, *, world_size: int, findings: Findings) -> None:
    """Check that the batch divides among the processes."""
    batch, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE
    # With a reference size Detectron2 scales the batch to the processes present.
    parts, cause = (reference, "SOLVER.REFERENCE_WORLD_SIZE") if reference else (world_size, "GPUs")
    if batch < 1 or batch % max(parts, 1):
        nearest = max(parts, round(batch / max(parts, 1)) * parts, 1)
        findings.errors.append(
            f"SOLVER.IMS_PER_BATCH must be a positive multiple of {parts} ({cause}), got {batch}; "
            f"set SOLVER.IMS_PER_BATCH {nearest}"
        )


def check_solver(cfg: CfgNode, findings: Findings) -> None:
    """Check that the device trains in the precision asked for, and what the optimizer is named."""
    device, clip = cfg.MODEL.DEVICE, cfg.SOLVER.CLIP_GRADIENTS
    if cfg.SOLVER.AMP.ENABLED and not device.startswith("cuda"):
        findings.errors.append(
            f"SOLVER.AMP.ENABLED needs a CUDA device, but MODEL.DEVICE is {device}; "
            "set SOLVER.AMP.ENABLED False"
        )
    named = {
        "OPTIMIZER": (cfg.SOLVER.OPTIMIZER, OPTIMIZERS),
        "ON_NONFINITE": (cfg.SOLVER.ON_NONFINITE, POLICIES),
    }
    if clip.ENABLED:
        named["CLIP_GRADIENTS.CLIP_TYPE"] = (clip.CLIP_TYPE, CLIP_TYPES)
    for key, (value, known) in named.items():
        if value not in known:
            hint = did_you_mean(value, known)
            findings.errors.append(f"SOLVER.{key}: there is no {value!r}; {hint}")


def check_output(cfg: CfgNode, findings: Findings) -> None:
    """Check by trying that the output folder can be made, and leave nothing behind.

    Permissions alone do not tell: a file system may be read-only, or full, for everyone.
    """
    folder = Path(cfg.OUTPUT_DIR).absolute()
    parent = next(p for p in (folder, *folder.parents) if p.exists())
    fix = "set OUTPUT_DIR to a folder that you may write to"
    if not parent.is_dir():
        findings.errors.append(f"OUTPUT_DIR {cfg.OUTPUT_DIR}: {parent} is a file; {fix}")
        return
    try:
        TemporaryDirectory(dir=parent).cleanup()
    except OSError as error:
        reason = error.strerror or error
        findings.errors.append(
            f"OUTPUT_DIR {cfg.OUTPUT_DIR}: {parent} is not writable ({reason}); {fix}"
        )


def check_weights(cfg: CfgNode, *, eval_only: bool, resume: bool, findings: Findings) -> None:
    """Check that the file that the run starts from is there; addresses are not fetched."""
    if resume and Path(cfg.OUTPUT_DIR, LAST_CHECKPOINT).is_file():
        _check_last_checkpoint(Path(cfg.OUTPUT_DIR), findings)
        return
    if resume:
        findings.notes.append(
            f"--resume: {cfg.OUTPUT_DIR} holds no checkpoint yet, the run starts at the beginning"
        )
    path = cfg.MODEL.WEIGHTS
    if not path:
        kind = "evaluation" if eval_only else "training"
        findings.notes.append(f"MODEL.WEIGHTS is empty: {kind} starts from random weights")
    elif "://" not in path and not Path(path.partition("?")[0]).is_file():
        findings.errors.append(
            f"MODEL.WEIGHTS {path} does not exist; set MODEL.WEIGHTS to an existing file, or to "
            '"" for random weights'
        )


def _check_last_checkpoint(folder: Path, findings: Findings) -> None:
    named = (folder / LAST_CHECKPOINT).read_text().strip()
    if not (folder / named).is_file():
        findings.errors.append(
            f"--resume: {folder / LAST_CHECKPOINT} names {named}, which is not there; delete "
            f"{LAST_CHECKPOINT}, or name another checkpoint in it"
        )
