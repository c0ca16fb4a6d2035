"""Stand-in for Detectron2's compiled operators, added by ctxseg's pure-Python repackaging.

It imports like the compiled module, so that everything that does not need a compiled operator
works. Using an operator raises an error that names the remedy.
"""

REMEDY = (
    "python -m pip install --no-build-isolation --force-reinstall --no-deps "
    "git+https://github.com/facebookresearch/detectron2.git"
)


class MissingCompiledOperatorError(NotImplementedError):
    """A compiled Detectron2 operator was used, and this build has none."""


def get_compiler_version():
    """Report to `detectron2.utils.collect_env` that nothing was compiled."""
    return "none (pure-Python build, no compiled operators)"


def get_cuda_version():
    """Report to `detectron2.utils.collect_env` that nothing was compiled for CUDA."""
    return "none (pure-Python build, no compiled operators)"


def has_cuda():
    """Report to `detectron2.utils.collect_env` that there are no architecture flags to read."""
    return False


def __getattr__(name):
    if name.startswith("__"):  # import machinery and inspection probe these; they must stay absent
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    raise MissingCompiledOperatorError(
        f"'{name}' is a compiled Detectron2 operator (deformable convolution, rotated boxes or the "
        "fast COCO evaluator) and this pure-Python build has none. For COCO evaluation use "
        "COCOEvaluator, which falls back to pycocotools; for the others build Detectron2 from "
        f"source against your PyTorch: {REMEDY}"
    )
