"""Script: import Detectron2 and print, as one line of JSON, what was found. Needs nothing else."""

import importlib.util
import json
from importlib import metadata
from typing import Any


def owning_version(origin: str) -> str | None:
    """Return the version of the distribution that installed the file `origin`, if one did."""
    try:
        found = metadata.distribution("detectron2")
    except metadata.PackageNotFoundError:
        return None
    return found.version if str(found.locate_file("detectron2/__init__.py")) == origin else None


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
        if isinstance(error, ModuleNotFoundError):
            answer["missing"] = error.name
    print("\n" + json.dumps(answer))


if __name__ == "__main__":
    main()
