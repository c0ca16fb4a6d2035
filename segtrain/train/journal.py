"""The journal of a run: one JSON object a line, readable while training goes on."""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from segtrain.errors import UserError
from segtrain.files import place_explained, plain, write_text

NAME = "log.jsonl"


class Journal:
    """Appends records; each has an "event" and the "step" it happened at.

    Args:
        folder: Of the run.
        tensorboard: Whether to write the numbers for TensorBoard as well, in `tensorboard/`.

    Raises:
        UserError: If TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, *, tensorboard: bool = False) -> None:
        self._path = folder / NAME
        self._board = _open_board(folder / "tensorboard") if tensorboard else None

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Append a record.

        Args:
            event: What happened: "start", "resume", "train", "evaluate", "save", "stop",
                "nonfinite".
            step: Updates done so far.
            values: Numbers, texts and dicts of them; what is not finite becomes null.

        Raises:
            UserError: If the disk is full.
        """
        # The clock is for people: nothing depends on it, it may be wrong or go backwards.
        record = {"event": event, "step": step, "time": round(time.time(), 3), **plain(values)}
        line = json.dumps(record, allow_nan=False) + "\n"
        with place_explained(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(line)
        if self._board is not None:
            for name, value in record.items():
                if isinstance(value, float) and name != "time":
                    self._board.add_scalar(f"{event}/{name}", value, step)

    def forget_after(self, step: int, *, evaluated: int) -> None:
        """Drop what happened after a step: a run that continues there writes it again.

        Args:
            step: Of the checkpoint to continue from.
            evaluated: Of the last evaluation whose results were written.
        """
        last = {"evaluate": min(step, evaluated)}
        records = [r for r in read_journal(self._path) if r["step"] <= last.get(r["event"], step)]
        write_text(self._path, "".join(json.dumps(record) + "\n" for record in records))

    def close(self) -> None:
        """Write out what TensorBoard still holds back."""
        if self._board is not None:
            self._board.close()


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """Read the records of a journal, in order; a line that a crash cut off is skipped.

    Args:
        path: The file; where there is none, there are no records.

    Yields:
        Records as they were written.
    """
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def _open_board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "train.tensorboard needs a package that is not installed; "
            "run: pip install tensorboard, or write train.tensorboard: false"
        ) from error
    return SummaryWriter(folder)
