"""cityscapesScripts' evaluation of pixels, made to run on numpy 2.

The script needs `np.in1d`, which numpy 2.4 has no more. A private copy of its module gets a numpy
of its own that has it; numpy, the installed module and the current directory stay as they are.
Tested with 2.3.0; a test fails when upstream needs none of this any more.
"""

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from segtrain.errors import UserError

PACKAGE = "cityscapesscripts"
_MODULE = f"{PACKAGE}.evaluation.evalPixelLevelSemanticLabeling"


class _NumpyWithIn1d:
    """Stands in for numpy in one module."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def in1d(values: Any, allowed: Any, **options: Any) -> np.ndarray:
        return np.isin(np.ravel(values), allowed, **options)


def version() -> str:
    """The installed version of cityscapesScripts."""
    return metadata.version(PACKAGE)


def pixel_scores(pairs: Mapping[Path, Path]) -> dict[str, Any]:
    """IoU of classes and categories; iIoU too where the instance ids are there.

    Args:
        pairs: `*_gtFine_labelIds.png` -> PNG of predicted label ids.

    Returns:
        The script's results from 0 to 1: "averageScoreClasses", "classScores" and others.

    Raises:
        UserError: If cityscapesScripts is missing, or a file is not as it expects it.
    """
    with _explained():
        module = _private_copy()
        module.args.evalInstLevelScore = all(_instance_ids(truth).is_file() for truth in pairs)
        module.args.JSONOutput, module.args.quiet = False, True
        truths, predictions = map(str, pairs), map(str, pairs.values())
        return module.evaluateImgLists(list(predictions), list(truths), module.args)


def _instance_ids(truth: Path) -> Path:
    return truth.with_name(truth.name.replace("labelIds", "instanceIds"))


def _private_copy() -> ModuleType:
    """The script's module, not in `sys.modules`, with the stand-in in place."""
    try:
        spec = importlib.util.find_spec(_MODULE)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.loader is None:
        raise UserError(
            "cityscapesScripts is not installed, whose code evaluates Cityscapes; install it "
            "with: pip install 'ctxseg[seg]'"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.np = _NumpyWithIn1d()
    return module


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Keep the script quiet; where it would end the process, raise what it printed last."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), warnings.catch_warnings():
            # Means over classes that do not occur are NaN, which is what they should be.
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    except SystemExit:
        lines = output.getvalue().strip().splitlines() or ["no reason given"]
        raise UserError(f"cityscapesScripts: {lines[-1].removeprefix('ERROR: ')}") from None
