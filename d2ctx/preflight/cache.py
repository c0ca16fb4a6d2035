"""Memory of the image files that were whole, so that a second start reads none of them."""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d2ctx.files import user_cache, write_text


@dataclass(frozen=True)
class FileState:
    """What changes when a file is written again: length in bytes, time in nanoseconds."""

    length: int
    time: int

    @classmethod
    def of(cls, path: str) -> "FileState":
        """The state of a file that exists."""
        stat = os.stat(path)
        return cls(length=stat.st_size, time=stat.st_mtime_ns)


@dataclass
class CheckedFiles:
    """The known-good files of one image folder.

    Attributes:
        file: Where they are remembered.
        entries: Name below the folder -> [length, time, width, height, whether it was decoded].
    """

    file: Path
    entries: dict[str, list[Any]] = field(default_factory=dict)

    @classmethod
    def of_folder(cls, image_root: str) -> "CheckedFiles":
        """What is remembered of a folder; nothing where there is no readable memory."""
        digest = hashlib.sha256(os.path.abspath(image_root).encode()).hexdigest()[:16]
        file = cache_folder() / f"images-v1-{digest}.json"
        try:
            entries = json.loads(file.read_bytes())
        except (OSError, ValueError):
            entries = None
        known = entries.items() if isinstance(entries, dict) else ()
        return cls(file, {n: e for n, e in known if isinstance(e, list) and len(e) == 5})

    def size_of(self, name: str, state: FileState, *, decoded: bool) -> tuple[int, int] | None:
        """Width and height of an unchanged file; None where it must be read.

        Args:
            name: The file.
            state: Its present state.
            decoded: Whether only a file that was decoded as a whole counts.
        """
        length, time, width, height, was_decoded = self.entries.get(name, (-1, -1, 0, 0, False))
        unchanged = (length, time) == (state.length, state.time)
        return (width, height) if unchanged and was_decoded >= decoded else None

    def add(self, name: str, state: FileState, *, size: tuple[int, int], decoded: bool) -> None:
        """Remember a good file."""
        self.entries[name] = [state.length, state.time, *size, decoded]

    def save(self) -> None:
        """Write the memory; where that is impossible, the next start reads the files again."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.file, json.dumps(self.entries))
        except OSError:
            return


def cache_folder() -> Path:
    """Our folder in the user's cache."""
    return user_cache() / "d2ctx"
