"""Starting a run, and going on with one: everything around the loop."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from segtrain import dist
from segtrain.config.schema import RunConfig
from segtrain.data.loader import dead_workers_explained
from segtrain.files import place_explained, run_lock
from segtrain.train.feed import Feed
from segtrain.train.folder import (
    check_free,
    read_folder,
    read_results,
    remove_partial,
    start_folder,
)
from segtrain.train.journal import Journal
from segtrain.train.loop import Run
from segtrain.train.progress import Progress
from segtrain.train.rng import seed_generators
from segtrain.train.state import (
    TrainingState,
    batch_norm_notice,
    build_state,
    micro_batch,
    restore_generators,
)
from segtrain.wording import plural

_FAR = 1_000_003  # seeds of different steps shall not meet those of other processes


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a configuration is made into.

    Args:
        model: With its initial weights.
        feed: Data and evaluation.
        images: Training images.
        notes: What the user should read before training.
    """

    model: nn.Module
    feed: Feed
    images: int
    notes: list[str] = field(default_factory=list)


Build = Callable[[RunConfig, torch.device, bool], Parts]


def train(config: RunConfig, *, build: Build) -> dict[str, Any]:
    """Start a run in `config.output`.

    Args:
        config: Of the run.
        build: (configuration, device, whether weights are about to be restored) -> parts.

    Returns:
        Results of the last evaluation, see `Run.evaluate`.

    Raises:
        UserError: If the folder holds a run or is in use, or something does not fit.
        Interrupted: After a signal; the state is saved.
    """
    folder = Path(config.output)
    with dist.process_group() as device, _held(folder):
        check_free(folder)
        set_up(config)
        parts = build(config, device, False)
        state = build_state(parts.model, config, device)
        seed_generators(config.train.seed + 1 + dist.rank())
        dist.barrier()  # nobody looks for a run any more
        if dist.is_main():
            start_folder(folder, config, device=device)
        return _run(config, folder, state, parts, device)


def resume(folder: Path, *, build: Build) -> dict[str, Any]:
    """Go on with a run from its newest checkpoint.

    Args:
        folder: Of the run.
        build: As in `train`.

    Returns:
        As `train`.

    Raises:
        UserError: If there is no run, its configuration was changed, or it is in use.
        Interrupted: After a signal; the state is saved.
    """
    with dist.process_group() as device, _held(folder, must_exist=True):
        notes: list[str] = []
        config, saved = read_folder(folder, notes=notes)
        state, parts = restored(config, saved, build=build, device=device)
        parts.notes.extend(notes)
        return _run(config, folder, state, parts, device)


def restored(
    config: RunConfig, saved: dict[str, Any], *, build: Build, device: torch.device
) -> tuple[TrainingState, Parts]:
    """Build a run and put it where a checkpoint was written.

    Args:
        config: Of the run.
        saved: The checkpoint.
        build: As in `train`.
        device: Of this process.

    Returns:
        The state, and what the run is made of; a note says where generators are not restored.
    """
    set_up(config)
    parts = build(config, device, True)
    state = build_state(parts.model, config, device)
    state.load_state_dict(saved)
    if not restore_generators(saved):
        parts.notes.append(
            "the checkpoint is of another number of processes: dropout draws other numbers"
        )
        seed_generators(config.train.seed + 1 + dist.rank() + _FAR * state.step)
    return state, parts


def _run(
    config: RunConfig, folder: Path, state: TrainingState, parts: Parts, device: torch.device
) -> dict[str, Any]:
    dist.set_patience(config.train.timeout_minutes)
    journal = None
    if dist.is_main():
        journal = Journal(folder, tensorboard=config.train.tensorboard)
        journal.forget_after(state.step, evaluated=read_results(folder)["step"])
    progress = Progress(total=config.train.iters, done=state.step)
    run = Run(
        config=config,
        folder=folder,
        state=state,
        feed=parts.feed,
        device=device,
        journal=journal,
        progress=progress,
    )
    notice = batch_norm_notice(state.model, config, device)
    for line in (*parts.notes, *summary(config, parts, device), *([notice] if notice else [])):
        progress.note(line)
    run.write("resume" if state.step else "start", {"processes": dist.world_size()})
    try:
        with dead_workers_explained(run.how_to_go_on):
            return run.train()
    finally:
        if journal is not None:
            journal.close()


def summary(config: RunConfig, parts: Parts, device: torch.device) -> list[str]:
    """What follows from a configuration, in a few lines.

    Args:
        config: Of the run.
        parts: Of the run.
        device: Of this process.

    Returns:
        Lines.
    """
    options, processes = config.train, dist.world_size()
    micro = micro_batch(options)
    passes = options.global_batch // (micro * processes)
    count = sum(p.numel() for p in parts.model.parameters() if p.requires_grad)
    epochs = options.iters * options.global_batch / parts.images
    return [
        f"{config.output}: {config.model.name}, {count / 1e6:.2f} M trainable parameters, "
        f"{options.precision} on {device.type}",
        f"batch {options.global_batch} = {plural(processes, 'process')} x "
        f"{plural(passes, 'pass')} x {plural(micro, 'image')}; {plural(options.iters, 'update')} "
        f"= {epochs:.1f} epochs of {plural(parts.images, 'image')}; {config.optim.name}, "
        f"learning rate {config.optim.lr:g}",
    ]


@contextmanager
def _held(folder: Path, *, must_exist: bool = False) -> Iterator[None]:
    """Keep other runs out of a folder while the main process lives."""
    if not dist.is_main() or (must_exist and not folder.is_dir()):
        yield
        return
    with place_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with run_lock(folder):
        remove_partial(folder)
        yield


def set_up(config: RunConfig) -> None:
    """Switches of torch, and the seed of the initial weights, which all processes share.

    Args:
        config: Of the run.
    """
    torch.backends.cudnn.benchmark = not config.train.deterministic
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.train.deterministic)
    seed_generators(config.train.seed)
