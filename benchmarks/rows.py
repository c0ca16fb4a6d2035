"""Results as rows that a program can read, and as a table that a person can."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

COMPARISONS = {
    "<=": lambda measured, limit: measured <= limit,
    "==": lambda measured, limit: measured == limit,
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a row should reach.

    Attributes:
        of: "ratio" (to the baseline) or "value".
        comparison: "<=" or "==".
        limit: The number on the right.
    """

    of: str
    limit: float
    comparison: str = "<="

    def __str__(self) -> str:
        return f"{self.of} {self.comparison} {self.limit:g}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured number beside its baseline.

    Attributes:
        name: What was measured: case and form.
        metric: Such as "time, forward + backward".
        unit: Of both values.
        value: The number, None where the form could not run.
        baseline: Name of the form compared with, "" for none.
        baseline_value: Its number in the same run, None where it could not run.
        ratio: value / baseline_value, None where one is missing.
        target: Text of the target, "" for none.
        met: Whether it is reached; None without a target.
        note: Why a value is missing.
    """

    name: str
    metric: str
    unit: str
    value: float | None
    baseline: str = ""
    baseline_value: float | None = None
    ratio: float | None = None
    target: str = ""
    met: bool | None = None
    note: str = ""


def compare(
    name: str,
    metric: str,
    unit: str,
    value: float | None,
    *,
    baseline: str = "",
    baseline_value: float | None = None,
    target: Target | None = None,
    note: str = "",
) -> Row:
    """Make a row: ratio, and whether the target is met (a missing number meets none)."""
    known = value is not None and baseline_value
    ratio = value / baseline_value if known else None
    measured = {"ratio": ratio, "value": value}
    met = None
    if target is not None:
        number = measured[target.of]
        met = number is not None and COMPARISONS[target.comparison](number, target.limit)
    return Row(
        name=name,
        metric=metric,
        unit=unit,
        value=value,
        baseline=baseline,
        baseline_value=baseline_value,
        ratio=ratio,
        target=str(target or ""),
        met=met,
        note=note,
    )


def as_json(rows: Sequence[Row], metadata: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Content of a result file: one metadata block, and the rows."""
    return {"metadata": metadata, **more, "rows": [asdict(row) for row in rows]}


def print_table(rows: Sequence[Row]) -> None:
    """Print rows below each other with ratio, target and verdict."""
    widths = max(len(r.name) for r in rows), max(len(r.metric) for r in rows)
    for row in rows:
        value = "failed" if row.value is None else _number(row.value)
        beside = ""
        if row.baseline:
            base = "failed" if row.baseline_value is None else _number(row.baseline_value)
            beside = f"{row.baseline} {base}"
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}x"
        verdict = {None: "", True: "met", False: "MISSED"}[row.met]
        print(
            f"{row.name:{widths[0]}}  {row.metric:{widths[1]}} {value:>12} {row.unit:5}"
            f"{beside:>28} {ratio:>9}  {row.target:16} {verdict} {row.note}"
        )


def _number(value: float) -> str:
    if float(value).is_integer() and abs(value) < 1e12:
        return f"{int(value):,}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
