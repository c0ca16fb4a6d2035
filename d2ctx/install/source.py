"""The one source archive that is repackaged: its name, its checksum, and its safe unpacking."""

import hashlib
import tarfile
from pathlib import Path

from d2ctx.errors import UserError

PROJECT = "detectron2-cdo"
SDIST_NAME = "detectron2_cdo-0.5.tar.gz"
SDIST_SHA256 = "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18"
SDIST_ROOT = "detectron2_cdo-0.5"

UPSTREAM_VERSION = "0.5"
LOCAL_LABEL = "ctxseg"
REVISION = 1
VERSION = f"{UPSTREAM_VERSION}+{LOCAL_LABEL}{REVISION}"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as lower-case hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: Path, *, expected: str = SDIST_SHA256) -> None:
    """Refuse an archive that is not, byte for byte, the one this installer was written for.

    Args:
        path: The archive.
        expected: The SHA-256 it must have.

    Raises:
        UserError: The file is missing or has another checksum.
    """
    if not path.is_file():
        raise UserError(
            f"expected the source archive {SDIST_NAME} at {path}, got no such file; "
            "give the path of a downloaded copy to --sdist"
        )
    got = sha256_of(path)
    if got != expected:
        raise UserError(
            f"expected {SDIST_NAME} with sha256 {expected}, got {got} in {path}; "
            "nothing was unpacked: delete that file and fetch it again"
        )


def unpack(archive: Path, *, into: Path) -> Path:
    """Verify an archive, extract it below `into`, and return the folder with its files.

    Args:
        archive: The source archive.
        into: An existing folder; members that would leave it are refused by the `data` filter.

    Returns:
        The archive's single top-level folder.

    Raises:
        UserError: The checksum is not the expected one; nothing is extracted then.
    """
    verify(archive)
    with tarfile.open(archive, mode="r:gz") as tar:
        tar.extractall(into, filter="data")
    return into / SDIST_ROOT
