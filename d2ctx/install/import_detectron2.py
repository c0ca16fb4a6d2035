"""Script: import Detectron2 and print, as one line of JSON, what was found. Needs nothing else."""

import importlib.util
import json
import sys
import traceback
from importlib import metadata
from typing import Any


def owning_version(origin: str) -> str | None:
    """Return the version of the distribution that installed the file `origin`, if one did."""
    try:
        found = metadata.distribution("detectron2")
    except metadata.PackageNotFoundError:
        return None
    return found.version if str(found.locate_file("detectron2/__init__.py")) == origin else None


def failing_library(error: BaseException) -> str | None:
    """Return the package at fault: the missing one, or the last one that was being run."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return error.name.partition(".")[0]
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    names = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame in frames]
    packages = [name for name in names if name not in {*sys.stdlib_module_names, "__main__"}]
    return packages[-1] if packages else None


def compiled_operators() -> bool:
    """Return whether `detectron2._C` is a compiled module rather than missing or a stand-in."""
    try:
        from detectron2 import _C
    except ImportError:
        return False
    return not str(getattr(_C, "__file__", "")).endswith(".py")


def look(answer: dict[str, Any]) -> None:
    """Fill in the answer step by step; what is known before an error stays."""
    spec = importlib.util.find_spec("detectron2")
    # A folder that an uninstallation left behind is a namespace package, without an origin.
    if spec is None or spec.origin is None:
        return
    answer |= {
        "present": True,
        "path": spec.origin,
        "metadata_version": owning_version(spec.origin),
    }
    import detectron2

    answer["version"] = getattr(detectron2, "__version__", None)
    import detectron2.data
    import detectron2.layers
    import detectron2.modeling  # noqa: F401 - the import is the test

    answer["compiled"] = compiled_operators()


def main() -> None:
    """Print the answer; an import may have printed lines of its own before."""
    answer: dict[str, Any] = {"present": False}
    try:
        look(answer)
    except BaseException as error:  # whatever it is, it is the answer
        answer["error"] = f"{type(error).__name__}: {error}"
        answer |= {
            "library": failing_library(error),
            "missing": isinstance(error, ModuleNotFoundError),
        }
    print("\n" + json.dumps(answer))


if __name__ == "__main__":
    main()
