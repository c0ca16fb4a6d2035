"""The context gym: every paper's claim as a small controlled experiment, each method beside a twin.

`python -m benchmarks.gym [--only TEXT] [--seeds N] [--jobs 2]`, then
`python -m benchmarks.gym --write RESULT.json` for docs/evidence.md and its plot; `--collect` trains
nothing and tells of what has finished.

Images of `segtrain data synth --task`, 64 x 64; networks of `gym_parts.pairs`. A twin differs from
its method in the mechanism alone: same stem and first weights, same number of weights (+-10 %),
images, order, optimiser, steps. Scored are only the pixels that need the mechanism. A training that
has finished is not repeated.

What is expected stands here, written before the full run: of the tasks what the papers claim, and
"equal" of the control, where every pixel tells its class. Sizes and budgets were tried out with
seed 0, which is none of the seeds of the results; there, bilinear up-sampling with 3x3 convolutions
behind it was better than content-aware up-sampling.
"""

import argparse
import json
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import metadata, save
from benchmarks.gym_parts.pairs import PAIRS
from benchmarks.gym_parts.report import write_evidence
from benchmarks.gym_parts.statistics import LEVEL, MARGIN, SAMPLES, paired, verdict
from benchmarks.gym_parts.training import SIDES, Budget, Run, train_and_count
from benchmarks.rows import Row, as_json, compare, print_table

ROOT = Path(__file__).resolve().parent.parent
SEEDS = 3


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """One experiment, and who should win it.

    Attributes:
        task: Name of the images.
        pair: Name of the networks.
        winner: "method" or "equal".
        why: The claim, or why there is none.
    """

    task: str
    pair: str
    winner: str
    why: str

    @property
    def name(self) -> str:
        """Task and pair."""
        return f"{self.task}: {self.pair}"


def _expect(task: str, pair: str, winner: str, why: str) -> Expectation:
    return Expectation(task=task, pair=pair, winner=winner, why=why)


_CONTROL = "every pixel tells its class: nothing to gain from context"
EXPECTATIONS = (
    _expect("far", "Segmenter", "method", "global context already at the first layer (abstract)"),
    _expect("far", "FPT ST", "method", "non-local interaction within a level (Sec. 3.2)"),
    _expect("far", "SR", "method", "the squeezed vector tells every position (Sec. III)"),
    _expect("far", "UN-EPT", "method", "a few sampled points are context enough (Sec. 3.1)"),
    _expect("far", "A²-FPN MGC", "method", "global context for all levels (Sec. 3.1)"),
    _expect("whole", "FPT GT", "method", "a coarse level grounded in pixels (Sec. 3.3)"),
    _expect("whole", "A²-FPN", "equal", "FPN hands the coarse level down, too"),
    _expect("detail", "FPT RT", "method", "a coarse level gets fine attributes (Sec. 3.4)"),
    _expect("boundary", "CARAFE", "method", "content-aware beats interpolation (A²-FPN, Sec. 3.2)"),
    _expect("boundary", "CARAFE, conv behind", "method", "the same claim"),
    _expect("boundary", "A²-FPN GACARAFE", "method", "guided by both levels (Sec. 3.2)"),
    _expect("boundary", "UN-EPT refinement", "method", "interior logits are better (Sec. 3.2)"),
    _expect("boundary", "UN-EPT spatial", "method", "details straight from the image (Sec. 3.2)"),
    _expect("scene", "SR", "method", "reasoning over concepts of the scene (Sec. III)"),
    _expect("local", "Segmenter", "equal", _CONTROL),
    _expect("local", "FPT ST", "equal", _CONTROL),
    _expect("local", "SR", "equal", _CONTROL),
    _expect("local", "UN-EPT", "equal", _CONTROL),
    _expect("local", "A²-FPN MGC", "equal", _CONTROL),
    _expect("local", "FPT GT", "equal", _CONTROL),
    _expect("local", "FPT RT", "equal", _CONTROL),
)
# Other budgets, by pair, where the usual one was too short with seed 0.
BUDGETS = {"Segmenter": {"steps": 400, "rate": 1e-3}, "UN-EPT": {"steps": 250}}
BUDGETS |= {"FPT RT": {"steps": 250}, "UN-EPT refinement": {"steps": 400}}


def budget_of(pair: str, steps: int) -> Budget:
    """What both sides of a pair get.

    Args:
        pair: Its name.
        steps: 0 for the usual number.

    Returns:
        The budget.
    """
    usual = replace(Budget(), **BUDGETS.get(pair, {}))
    return replace(usual, steps=steps) if steps else usual


def planned(expectations: Sequence[Expectation], seeds: int, steps: int) -> list[Run]:
    """All trainings; seed by seed, so that a run that is cut short still has whole seeds.

    Args:
        expectations: The experiments.
        seeds: How many, from 1.
        steps: 0 for the usual number.

    Returns:
        The trainings.
    """
    return [
        Run(task=e.task, pair=e.pair, side=side, seed=seed, budget=budget_of(e.pair, steps))
        for seed in range(1, seeds + 1)
        for e in expectations
        for side in SIDES
    ]


def finished(run: Run, output: Path) -> dict[str, Any] | None:
    """What a training has left; None if it has not finished, or was another one."""
    path = _record(run, output)
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    return found if found["run"] == run.about() else None


def train(run: Run, output: Path) -> dict[str, Any]:
    """Train and keep what was counted; called in a process of its own.

    Args:
        run: What.
        output: Where results are kept.

    Returns:
        As `train_and_count`.
    """
    torch.set_num_threads(1)
    found = train_and_count(run, output / "images")
    path = _record(run, output)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(found))
    part.replace(path)
    return found


def _record(run: Run, output: Path) -> Path:
    name = f"{run.task}_{run.pair}_{run.side}_{run.seed}".replace(" ", "-").replace(",", "")
    return output / f"{name}.json"


def _results(
    runs: Sequence[Run], output: Path, jobs: int, *, collect: bool
) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Results as they come, those of earlier calls first."""
    missing = []
    for run in runs:
        if found := finished(run, output):
            yield run, found
        else:
            missing.append(run)
    if collect:
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=jobs, mp_context=context) as pool:
        waiting = {pool.submit(train, run, output): run for run in missing}
        for done in as_completed(waiting):
            yield waiting[done], done.result()


def whole_seeds(found: Mapping[tuple[str, int], Any]) -> list[int]:
    """Seeds of which both sides have finished, of results by side and seed."""
    return sorted(seed for side, seed in found if side == SIDES[0] and (SIDES[1], seed) in found)


def summary(e: Expectation, found: Mapping[tuple[str, int], Mapping[str, Any]]) -> dict[str, Any]:
    """Everything the report says of one experiment.

    Args:
        e: The experiment.
        found: Results by side and seed; seeds without both sides do not count.

    Returns:
        Plain values; scores from 0 to 1.
    """
    seeds = whole_seeds(found)
    counts = {
        side: tuple(
            np.array([found[side, seed][kind] for seed in seeds], np.float64)
            for kind in ("right", "union")
        )
        for side in SIDES
    }
    result = paired(counts["method"], counts["twin"])
    several = [found[side, seeds[0]]["parameters"] for side in SIDES]
    return {
        "name": e.name,
        "task": e.task,
        "pair": e.pair,
        "what": PAIRS[e.pair].what,
        "expected": e.winner,
        "why": e.why,
        "verdict": verdict(e.winner, result.low, result.high),
        "method": result.method,
        "twin": result.twin,
        "difference": result.difference,
        "low": result.low,
        "high": result.high,
        "by_seed": list(result.by_seed),
        "seeds": seeds,
        "parameters": several,
        "steps": budget_of(e.pair, 0).steps,
        "seconds": [float(np.mean([found[s, seed]["seconds"] for seed in seeds])) for s in SIDES],
    }


def rows_of(summaries: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Scores of the methods beside those of their twins, in percent."""
    return [
        compare(
            s["name"],
            "Boundary IoU" if s["task"] == "boundary" else "mIoU",
            "%",
            100 * s["method"],
            baseline="twin",
            baseline_value=100 * s["twin"],
            note=f"difference {100 * s['difference']:+.1f} [{100 * s['low']:+.1f}, "
            f"{100 * s['high']:+.1f}], expected {s['expected']}: {s['verdict']}",
        )
        for s in summaries
    ]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="experiments whose name contains this")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"default {SEEDS}")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    parser.add_argument("--steps", type=int, default=0, help="0: as planned; others for a try")
    parser.add_argument("--collect", action="store_true", help="train nothing")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "gym")
    parser.add_argument("--write", type=Path, metavar="JSON", help="write docs/evidence.md from it")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, print the table, write the results."""
    options = parse(arguments)
    if options.write:
        print("written:", *write_evidence(options.write, ROOT))
        return
    chosen = [e for e in EXPECTATIONS if options.only in e.name]
    if not chosen:
        known = ", ".join(e.name for e in EXPECTATIONS)
        raise SystemExit(f"no experiment contains {options.only!r}; known: {known}")
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[tuple[str, int], dict[str, Any]]] = {e.name: {} for e in chosen}
    runs = planned(chosen, options.seeds, options.steps)
    results = _results(runs, output, options.jobs, collect=options.collect)
    for number, (run, result) in enumerate(results, start=1):
        found[f"{run.task}: {run.pair}"][run.side, run.seed] = result
        score = np.mean(np.sum(result["right"], 0) / np.maximum(1, np.sum(result["union"], 0)))
        print(
            f"{number}/{len(runs)} {run.task}: {run.pair}, {run.side}, seed {run.seed}: "
            f"{100 * score:.1f} ({result['seconds']:.0f} s)",
            flush=True,
        )
    summaries = [summary(e, found[e.name]) for e in chosen if whole_seeds(found[e.name])]
    if not summaries:
        raise SystemExit("no experiment has finished; leave --collect out")
    rows = rows_of(summaries)
    print_table(rows)
    about = metadata(device="cpu", seed=1) | {"level": LEVEL, "samples": SAMPLES, "margin": MARGIN}
    content = as_json(rows, about, experiments=summaries)
    content["unfinished"] = [
        e.name for e in chosen if len(whole_seeds(found[e.name])) < options.seeds
    ]
    print("written:", save(f"gym-cpu{options.jobs}", content))


if __name__ == "__main__":
    main()
