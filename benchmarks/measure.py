"""Measure one form of one case in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases.case import Case
from benchmarks.common import MIN_ROUNDS, peak_growth_mib, summary, time_phases

SEED = 0


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How to measure.

    Attributes:
        device: "cpu" or "cuda".
        seconds: Measured time per form.
        threads: CPU threads, 0 for PyTorch's choice.
    """

    device: str
    seconds: float
    threads: int

    def arguments(self) -> list[str]:
        """Command line that gives this setting."""
        return [f"--device={self.device}", f"--seconds={self.seconds}", f"--threads={self.threads}"]


def measure(case: Case, form: str, setting: Setting) -> dict[str, Any]:
    """Time, memory and error of one form; called in its own process."""
    inputs = _inputs(case, setting.device)
    run = _built(case, form, setting.device)
    leaves = _leaves(inputs, run) if case.backward else []
    state: dict[str, Tensor] = {}

    def forward() -> None:
        with torch.set_grad_enabled(case.backward):
            state["out"] = run(*inputs)

    def backward() -> None:
        out = state.pop("out")
        torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)

    phases = [forward, backward] if case.backward else [forward]

    def all_phases() -> None:
        for phase in phases:
            phase()
        state.clear()

    times: list[list[float]] = []

    def timed(warmup: int, seconds: float, rounds: int) -> None:
        device = setting.device
        times[:] = time_phases(
            phases, device=device, warmup=warmup, seconds=seconds, min_rounds=rounds
        )
        state.clear()

    if case.once:
        memory = peak_growth_mib(lambda: timed(0, 0, 1), device=setting.device)
    else:
        timed(1, setting.seconds, MIN_ROUNDS)
        memory = peak_growth_mib(all_phases, device=setting.device)
    total = summary([sum(parts) for parts in zip(*times, strict=True)])
    error = _error(case, inputs, run, setting.device) if case.reference else None
    return {"time": total, "memory": memory, "error": error}


def in_own_process(module: str, case: str, form: str, setting: Setting) -> dict[str, Any]:
    """Measure in a fresh process, so that no form leaves memory or threads behind for the next.

    Returns:
        What `measure` returned, or {"failed": last line of the error}.
    """
    command = [sys.executable, "-m", module, "--measure", case, form, *setting.arguments()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
        return {"failed": lines[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def _inputs(case: Case, device: str) -> list[Tensor]:
    torch.manual_seed(SEED)
    drawn = [x.to(device) for x in case.make()]
    return [x.requires_grad_(case.backward and x.is_floating_point()) for x in drawn]


def _built(case: Case, form: str, device: str) -> Callable[..., Tensor]:
    torch.manual_seed(SEED)
    run = case.forms[form]()
    return run.to(device) if isinstance(run, nn.Module) else run


def _leaves(inputs: Sequence[Tensor], run: Callable[..., Tensor]) -> list[Tensor]:
    parameters = list(run.parameters()) if isinstance(run, nn.Module) else []
    return [x for x in inputs if x.requires_grad] + parameters


def _error(case: Case, inputs: Sequence[Tensor], run: Callable[..., Tensor], device: str) -> float:
    """Largest absolute difference of the output from the reference in float64."""
    with torch.no_grad():
        reference = _built(case, case.reference, device)
        exact = reference(*[x.double() if x.is_floating_point() else x for x in inputs])
        return (run(*inputs).double() - exact).abs().max().item()
