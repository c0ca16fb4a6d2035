"""Turn the unpacked source into a pure-Python wheel, without running its build script."""

import base64
import hashlib
import zipfile
from pathlib import Path

from d2ctx.install.source import UPSTREAM_VERSION, VERSION
from d2ctx.install.substitutions import substitute

WHEEL_NAME = f"detectron2-{VERSION}-py3-none-any.whl"
DIST_INFO = f"detectron2-{VERSION}.dist-info"
STUB_FILE = "detectron2/_C.py"

# Where the source keeps the three projects that an installed Detectron2 has as subpackages.
_PROJECTS = {
    "detectron2/projects/point_rend": "projects/PointRend/point_rend",
    "detectron2/projects/deeplab": "projects/DeepLab/deeplab",
    "detectron2/projects/panoptic_deeplab": "projects/Panoptic-DeepLab/panoptic_deeplab",
}

# The source's own list without future and pydot (only Caffe2 used them) and without the pinned
# black (only LazyConfig.to_py imports it, inside the function).
REQUIREMENTS = (
    "Pillow>=7.1",
    "matplotlib",
    "pycocotools>=2.0.2",
    "termcolor>=1.1",
    "yacs>=0.1.6",
    "tabulate",
    "cloudpickle",
    "tqdm>4.29.0",
    "tensorboard",
    "fvcore>=0.1.5,<0.1.6",
    "iopath>=0.1.7,<0.1.10",
    "omegaconf>=2.1",
    "hydra-core>=1.1",
)

_METADATA_HEAD = f"""\
Metadata-Version: 2.4
Name: detectron2
Version: {VERSION}
Summary: Detectron2 {UPSTREAM_VERSION} without compiled operators, repackaged by ctxseg
Home-page: https://github.com/facebookresearch/detectron2
Author: FAIR
License-Expression: Apache-2.0
License-File: LICENSE
Requires-Python: >=3.9
"""

_WHEEL_FILE = """\
Wheel-Version: 1.0
Generator: ctxseg
Root-Is-Purelib: true
Tag: py3-none-any
"""

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip archive can hold


def _read_tree(folder: Path, *, prefix: str) -> dict[str, bytes]:
    wanted = (path for path in folder.rglob("*") if path.suffix in {".py", ".yaml"})
    return {f"{prefix}/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in wanted}


def source_files(source: Path) -> dict[str, bytes]:
    """Read the files that an installation of the source would contain, unchanged.

    Args:
        source: The unpacked archive.

    Returns:
        Path inside the installed package -> content.
    """
    files = _read_tree(source / "detectron2", prefix="detectron2")
    for package, folder in _PROJECTS.items():
        files |= _read_tree(source / folder, prefix=package)
    return files


def package_files(source: Path) -> dict[str, bytes]:
    """Return what the wheel installs: the source's files, substituted, and the operator stand-in.

    Args:
        source: The unpacked archive.

    Returns:
        Path inside the installed package -> content.
    """
    stub = Path(__file__).with_name("compiled_stub.py").read_bytes()
    return {**substitute(source_files(source)), STUB_FILE: stub}


def metadata_files(source: Path) -> dict[str, bytes]:
    """Return the wheel's metadata except its RECORD."""
    requires = "".join(f"Requires-Dist: {requirement}\n" for requirement in REQUIREMENTS)
    return {
        f"{DIST_INFO}/METADATA": (_METADATA_HEAD + requires).encode(),
        f"{DIST_INFO}/WHEEL": _WHEEL_FILE.encode(),
        f"{DIST_INFO}/top_level.txt": b"detectron2\n",
        f"{DIST_INFO}/licenses/LICENSE": (source / "LICENSE").read_bytes(),
    }


def record(files: dict[str, bytes]) -> bytes:
    """Return the RECORD of a wheel: path, digest and size of every file, and itself without."""

    def digest(content: bytes) -> str:
        raw = hashlib.sha256(content).digest()
        return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()

    rows = [f"{path},sha256={digest(files[path])},{len(files[path])}" for path in sorted(files)]
    return "\n".join([*rows, f"{DIST_INFO}/RECORD,,", ""]).encode()


def build_wheel(source: Path, *, into: Path) -> Path:
    """Write the wheel; equal sources give equal bytes.

    Args:
        source: The unpacked archive.
        into: The folder for the wheel; created when missing.

    Returns:
        The path of the wheel.
    """
    content = package_files(source)
    metadata = metadata_files(source)
    metadata[f"{DIST_INFO}/RECORD"] = record({**content, **metadata})
    into.mkdir(parents=True, exist_ok=True)
    target = into / WHEEL_NAME
    # Stored, not compressed: the bytes must not depend on the zlib in use.
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for group in (content, metadata):  # metadata last, as the wheel format recommends
            for path in sorted(group):
                info = zipfile.ZipInfo(path, date_time=_EPOCH)
                info.external_attr = 0o644 << 16
                archive.writestr(info, group[path])
    return target
