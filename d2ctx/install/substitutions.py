"""The textual changes that let Detectron2 0.5 run on current PyTorch, NumPy and Pillow.

Each entry says which text is replaced, how often it must occur and why. An entry that does not
match exactly is an error: a changed source is never patched half-way.
"""

from dataclasses import dataclass

from d2ctx.install.source import VERSION


@dataclass(frozen=True, kw_only=True)
class Substitution:
    """One replacement in one file of the source archive.

    Args:
        file: Path inside the installed package, with forward slashes.
        old: The text that is replaced.
        new: The text that takes its place.
        count: How often `old` must occur.
        reason: Why, as one clause; it goes into the file's notice of change.
    """

    file: str
    old: str
    new: str
    count: int
    reason: str


_NUMPY = "NumPy removed its aliases of Python's own types"
_MESHGRID = "torch.meshgrid warns unless the indexing is written out"
_RESOURCES = "pkg_resources is no longer part of setuptools"
_AMP = "torch.cuda.amp is deprecated in favour of torch.amp"

SUBSTITUTIONS = (
    Substitution(
        file="detectron2/data/transforms/transform.py",
        old="Image.LINEAR",
        new="Image.BILINEAR",
        count=1,
        reason="Pillow 10 removed the alias LINEAR of BILINEAR",
    ),
    Substitution(
        file="detectron2/data/build.py",
        old="dtype=np.int\n",
        new="dtype=int\n",
        count=1,
        reason=_NUMPY,
    ),
    Substitution(
        file="detectron2/data/build.py",
        old="dtype=np.int)",
        new="dtype=int)",
        count=1,
        reason=_NUMPY,
    ),
    Substitution(
        file="detectron2/data/datasets/pascal_voc.py",
        old="dtype=np.str)",
        new="dtype=str)",
        count=1,
        reason=_NUMPY,
    ),
    Substitution(
        file="detectron2/evaluation/pascal_voc_evaluation.py",
        old=".astype(np.bool)",
        new=".astype(bool)",
        count=2,
        reason=_NUMPY,
    ),
    Substitution(
        file="detectron2/evaluation/sem_seg_evaluation.py",
        old="dtype=np.int)",
        new="dtype=int)",
        count=2,
        reason=_NUMPY,
    ),
    Substitution(
        file="detectron2/evaluation/sem_seg_evaluation.py",
        old="np.float)",
        new="float)",
        count=5,
        reason=_NUMPY,
    ),
    Substitution(
        file="detectron2/structures/masks.py",
        old="np.bool)",
        new="bool)",
        count=2,
        reason=_NUMPY,
    ),
    Substitution(
        file="detectron2/utils/visualizer.py",
        old=".astype(np.bool)",
        new=".astype(bool)",
        count=3,
        reason=_NUMPY,
    ),
    Substitution(
        file="detectron2/utils/video_visualizer.py",
        old="dtype=np.bool)",
        new="dtype=bool)",
        count=1,
        reason=_NUMPY,
    ),
    Substitution(
        file="detectron2/model_zoo/model_zoo.py",
        old="import pkg_resources\n",
        new="from importlib import resources\n",
        count=1,
        reason=_RESOURCES,
    ),
    Substitution(
        file="detectron2/model_zoo/model_zoo.py",
        old="""pkg_resources.resource_filename(
        "detectron2.model_zoo", os.path.join("configs", config_path)
    )""",
        new="""str(
        resources.files("detectron2.model_zoo").joinpath("configs", config_path)
    )""",
        count=1,
        reason=_RESOURCES,
    ),
    Substitution(
        file="detectron2/modeling/anchor_generator.py",
        old="torch.meshgrid(shifts_y, shifts_x)",
        new='torch.meshgrid(shifts_y, shifts_x, indexing="ij")',
        count=1,
        reason=_MESHGRID,
    ),
    Substitution(
        file="detectron2/projects/panoptic_deeplab/post_processing.py",
        old="(width, dtype=offsets.dtype, device=offsets.device),\n    )",
        new='(width, dtype=offsets.dtype, device=offsets.device),\n        indexing="ij",\n    )',
        count=1,
        reason=_MESHGRID,
    ),
    Substitution(
        file="detectron2/engine/train_loop.py",
        old="from torch.cuda.amp import",
        new="from torch.amp import",
        count=2,
        reason=_AMP,
    ),
    Substitution(
        file="detectron2/engine/train_loop.py",
        old="with autocast():",
        new='with autocast("cuda"):',
        count=1,
        reason=_AMP,
    ),
    Substitution(
        file="detectron2/export/__init__.py",
        old="from .api import *\n",
        new="""try:
    from caffe2.proto import caffe2_pb2 as _caffe2
except ImportError:
    pass
else:
    from .api import *
""",
        count=1,
        reason="Caffe2 is no longer part of PyTorch, and utils.analysis imports this package",
    ),
    Substitution(
        file="detectron2/evaluation/coco_evaluation.py",
        old="        self._use_fast_impl = use_fast_impl\n",
        new="""        if use_fast_impl:
            self._logger.info("This build has no compiled COCO evaluator; pycocotools is used.")
        self._use_fast_impl = False
""",
        count=1,
        reason="the default evaluator is a compiled one, and would fail only after the training",
    ),
    Substitution(
        file="detectron2/layers/nms.py",
        old="return torch.ops.detectron2.nms_rotated(",
        new="from detectron2 import _C\n\n    return _C.nms_rotated(",
        count=1,
        reason="without compiled operators the call must name the remedy",
    ),
)


def notice(reasons: list[str]) -> str:
    """Return the comment line that marks a changed file, as the licence asks."""
    return f"# Changed by ctxseg for {VERSION}: {'; '.join(dict.fromkeys(reasons))}.\n"


def substitute(
    files: dict[str, bytes], *, substitutions: tuple[Substitution, ...] = SUBSTITUTIONS
) -> dict[str, bytes]:
    """Apply the substitutions and put a notice of change at the top of every changed file.

    Args:
        files: Package path -> content.
        substitutions: What to replace.

    Returns:
        A new mapping with the same keys.

    Raises:
        ValueError: A file is missing, or a text does not occur exactly as often as listed.
    """
    changed: dict[str, list[str]] = {}
    texts: dict[str, str] = {}
    for entry in substitutions:
        if entry.file not in files:
            raise ValueError(f"expected {entry.file} in the source archive, got no such file")
        text = texts.get(entry.file, files[entry.file].decode())
        got = text.count(entry.old)
        if got != entry.count:
            raise ValueError(
                f"expected {entry.old!r} {entry.count} times in {entry.file}, got {got}; "
                "the source is not the one the substitutions were written for"
            )
        texts[entry.file] = text.replace(entry.old, entry.new)
        changed.setdefault(entry.file, []).append(entry.reason)
    patched = {file: (notice(changed[file]) + text).encode() for file, text in texts.items()}
    return {**files, **patched}
