"""`losses.jsonl`: losses and learning rate of every iteration, and what befell it.

`metrics.json` of Detectron2 has every twentieth, smoothed. These are the numbers themselves, which
training has on the host anyway.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2ctx.files import write_text

NAME = "losses.jsonl"
_LINES = 20  # that wait in memory
Record = dict[str, Any]


class Journal:
    """Writes whole lines, some at a time; a process that is killed loses the last few.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._waiting: list[str] = []

    def write(self, record: Mapping[str, Any]) -> None:
        """Add a record.

        Args:
            record: With its "iteration"; NaN and infinity become text.
        """
        self._waiting.append(json.dumps(_plain(record), allow_nan=False) + "\n")
        if len(self._waiting) >= _LINES:
            self.flush()

    def flush(self) -> None:
        """Give what waits to the system."""
        if self._waiting:
            lines, self._waiting = self._waiting, []
            with self.path.open("a") as file:
                file.writelines(lines)

    def cut_back(self, iteration: int) -> None:
        """Forget all from an iteration on: it is done again.

        Args:
            iteration: The first to forget.
        """
        self._waiting = []
        if self.path.is_file():
            kept = [r for r in read_journal(self.path.parent) if r["iteration"] < iteration]
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))


def read_journal(folder: Path) -> list[Record]:
    """Every record of a run, in order; a line cut off by a crash is left out.

    Args:
        folder: Of the run.

    Returns:
        The records; none where there is no journal.
    """
    path, records = folder / NAME, []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and "iteration" in record:
            records.append(record)
    return records


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
