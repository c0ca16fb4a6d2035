"""Where a run will be written: free, writable, and a folder beside it for the rehearsal."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from segtrain.errors import UserError
from segtrain.files import LOCK_NAME, run_lock
from segtrain.train.folder import check_free


def check_output(folder: Path) -> Path:
    """Try whether a run may start in a folder; nothing is left there.

    Args:
        folder: For the run.

    Returns:
        The nearest folder above, or the folder itself, that exists.

    Raises:
        UserError: If it holds a run, is in use, or cannot be written.
    """
    try:
        check_free(folder)
        if (folder / LOCK_NAME).exists():
            with run_lock(folder):
                pass
        home = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with TemporaryFile(dir=home) as file:
            file.write(b"a run")
    except OSError as error:
        raise UserError(
            f"output {folder} cannot be written ({error.strerror or error}); write "
            "output=ANOTHER_FOLDER"
        ) from error
    return home


@contextmanager
def rehearsal_folder(home: Path | None) -> Iterator[Path]:
    """A folder on the disk of the run, removed afterwards.

    Args:
        home: Where to; None takes the system's place for such folders.

    Yields:
        The folder.
    """
    with TemporaryDirectory(prefix=".segtrain-plan-", dir=home) as folder:
        yield Path(folder)
