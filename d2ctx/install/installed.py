"""Find out which Detectron2, if any, this environment has, and whether it works."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from d2ctx.install.compiled_stub import REMEDY as BUILD_FROM_SOURCE
from d2ctx.install.isolated import ask
from d2ctx.install.source import LOCAL_LABEL, REVISION, UPSTREAM_VERSION

START_OVER = "python -m pip uninstall --yes detectron2 && python -m d2ctx.install"

# Import name -> what to install for it, where that is not the same name.
_DISTRIBUTIONS = {
    "torch": "torch torchvision",
    "fvcore": "'fvcore>=0.1.5,<0.1.6'",
    "iopath": "'iopath>=0.1.7,<0.1.10'",
    "cv2": "opencv-python-headless",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "hydra": "hydra-core",
}

_SCRIPT = Path(__file__).with_name("import_detectron2.py")


@dataclass(frozen=True, kw_only=True)
class Installed:
    """What a probe found.

    Args:
        present: Whether `detectron2` can be found at all.
        path: The package's `__init__.py`.
        version: `detectron2.__version__`.
        metadata_version: The version of the distribution that owns that path; None for a source
            tree.
        error: Why importing it fails, or None when it works.
        library: The package that this error comes from, when it is known.
        missing: Whether the error is that this package is not installed.
        compiled: Whether its compiled operators are there.
    """

    present: bool
    path: str | None = None
    version: str | None = None
    metadata_version: str | None = None
    error: str | None = None
    library: str | None = None
    missing: bool = False
    compiled: bool = False

    @property
    def works(self) -> bool:
        """Whether everything that d2ctx needs can be imported."""
        return self.present and self.error is None

    @property
    def revision(self) -> int | None:
        """Which of our own repackagings this is; None for anyone else's Detectron2."""
        pattern = rf"{re.escape(UPSTREAM_VERSION)}\+{LOCAL_LABEL}(\d+)"
        match = re.fullmatch(pattern, self.metadata_version or "")
        return int(match[1]) if match else None

    @property
    def outdated(self) -> bool:
        """Whether this is an older repackaging of ours, which an installation replaces."""
        return self.revision is not None and self.revision < REVISION

    def describe(self) -> str:
        """Return version, origin and place in a few words."""
        version = self.metadata_version or self.version or "of unknown version"
        origin = "repackaged by ctxseg" if self.revision is not None else "your own"
        folder = Path(self.path).parent if self.path else "an unknown place"
        return f"Detectron2 {version} ({origin}) in {folder}"

    def remedy(self) -> str:
        """Return the one command that mends an installation that cannot be imported."""
        if self.library not in {None, "detectron2"}:
            options = "" if self.missing else "--force-reinstall --no-deps "
            distribution = _DISTRIBUTIONS.get(str(self.library), self.library)
            return f"python -m pip install {options}{distribution}"
        if re.search(r"undefined symbol|DLL load|\.so|\.dylib|_C", self.error or ""):
            return BUILD_FROM_SOURCE
        return START_OVER


def probe(*, python: str = sys.executable) -> Installed:
    """Import Detectron2 in a fresh interpreter and report what happened.

    Args:
        python: The interpreter of the environment in question.

    Returns:
        What was found.
    """
    answer = ask(_SCRIPT, python=python)
    # An interpreter that dies on the import does so because there is something to import.
    return Installed(**({"present": True} | answer))
