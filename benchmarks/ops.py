"""Every operation against its baselines: time, peak memory, error; a table and a result file.

`python -m benchmarks.ops [--only TEXT] [--device cuda] [--threads N]`
"""

from typing import Any

from benchmarks import command
from benchmarks.cases import deformable, mixture, pyramid, reassembly, squeeze
from benchmarks.cases.case import ERROR, MEMORY, TIME, Case
from benchmarks.measure import in_own_process
from benchmarks.rows import Row, compare, print_table

MODULES = (mixture, reassembly, deformable, squeeze, pyramid)
CASES = {case.name: case for m in MODULES for case in m.CASES}
UNITS = {TIME: "ms", MEMORY: "MiB", ERROR: ""}


def value(result: dict[str, Any], metric: str) -> float | None:
    """The number of a metric in what `measure` returned, None where the form failed."""
    if "failed" in result:
        return None
    return result["time"]["median_ms"] if metric == TIME else result[key(metric)]


def key(metric: str) -> str:
    """Name of a metric in what `measure` returns."""
    return {TIME: "time", MEMORY: "memory", ERROR: "error"}[metric]


def rows_of(case: Case, results: dict[str, dict[str, Any]]) -> list[Row]:
    """One row per form and metric; the baseline gets none but where it is alone."""
    alone = len(case.forms) == 1
    metrics = [TIME, MEMORY, *([ERROR] if case.reference else [])]
    return [
        compare(
            f"{case.name}: {form}",
            f"{metric}, {case.phases}" if metric != ERROR else metric,
            UNITS[metric],
            value(results[form], metric),
            baseline="" if alone else case.baseline,
            baseline_value=None if alone else value(results[case.baseline], metric),
            target=case.targets.get(form, {}).get(metric),
            note=results[form].get("failed") or _baseline_failure(case, results),
        )
        for form in case.forms
        if form != case.baseline or alone
        for metric in metrics
    ]


def _baseline_failure(case: Case, results: dict[str, dict[str, Any]]) -> str:
    reason = results[case.baseline].get("failed", "")
    return f"{case.baseline}: {reason}" if reason else ""


def main() -> None:
    """Measure every case, print the table, write the results."""
    options = command.parser(__doc__).parse_args()
    setting = command.start(options, CASES)
    if setting is None:
        return
    rows: list[Row] = []
    details: dict[str, dict[str, Any]] = {}
    for case in CASES.values():
        if options.only in case.name and case.only_on in ("", options.device):
            results = {
                form: in_own_process("benchmarks.ops", case.name, form, setting)
                for form in case.forms
            }
            details[case.name] = results
            rows += (new := rows_of(case, results))
            print_table(new)
    command.finish("ops", rows, details, options, known=CASES)


if __name__ == "__main__":
    main()
