"""The wheel against the source archive, and the installed package against the wheel."""

import base64
import csv
import hashlib
import importlib
import io
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from d2ctx.errors import UserError
from d2ctx.install import compiled_stub, wheel
from d2ctx.install.fetch import fetch_sdist
from d2ctx.install.source import VERSION, unpack
from d2ctx.install.substitutions import SUBSTITUTIONS, notice

# What d2ctx uses, and what its users reach for next to it.
MODULES = """checkpoint config data data.datasets data.transforms engine engine.hooks evaluation
evaluation.fast_eval_api evaluation.lvis_evaluation evaluation.panoptic_evaluation layers
model_zoo modeling modeling.backbone modeling.meta_arch modeling.roi_heads projects.deeplab
projects.point_rend solver structures utils.analysis utils.events utils.logger utils.visualizer
utils.video_visualizer""".split()


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        archive = fetch_sdist()
    except UserError as error:
        pytest.skip(f"the source archive is not cached and cannot be fetched: {error}")
    return unpack(archive, into=tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def built(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel.build_wheel(unpacked, into=tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def contents(built: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(built) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def independently_changed(path: str, original: bytes) -> bytes:
    """Apply the listed substitutions of one file, in the plainest way."""
    entries = [entry for entry in SUBSTITUTIONS if entry.file == path]
    if not entries:
        return original
    text = original.decode()
    for entry in entries:
        text = text.replace(entry.old, entry.new)
    return (notice([entry.reason for entry in entries]) + text).encode()


def source_path(unpacked: Path, path: str) -> Path:
    """Map a path in the wheel to the source: three projects live elsewhere there."""
    for name, folder in (
        ("point_rend", "PointRend"),
        ("deeplab", "DeepLab"),
        ("panoptic_deeplab", "Panoptic-DeepLab"),
    ):
        prefix = f"detectron2/projects/{name}/"
        if path.startswith(prefix):
            return unpacked / "projects" / folder / name / path.removeprefix(prefix)
    return unpacked / path


def test_the_wheel_is_the_source_plus_substitutions_stub_and_metadata(
    unpacked: Path, contents: dict[str, bytes]
) -> None:
    package = {path for path in contents if not path.startswith(wheel.DIST_INFO)}
    assert contents[wheel.STUB_FILE] == Path(compiled_stub.__file__).read_bytes()
    package.remove(wheel.STUB_FILE)
    for path in package:
        original = source_path(unpacked, path).read_bytes()
        assert contents[path] == independently_changed(path, original), path
    sources = [
        path
        for folder in ("detectron2", "projects")
        for path in (unpacked / folder).rglob("*")
        if path.is_file()
    ]
    assert {source_path(unpacked, path) for path in package} == set(sources)


def test_every_substitution_matches_and_nothing_listed_is_left(contents: dict[str, bytes]) -> None:
    for entry in SUBSTITUTIONS:
        text = contents[entry.file].decode()
        assert text.count(entry.new) >= entry.count
        if entry.old not in entry.new:
            assert entry.old not in text
        assert entry.reason in text.splitlines()[0]


def test_the_record_lists_every_file_with_digest_and_size(contents: dict[str, bytes]) -> None:
    rows = list(csv.reader(io.StringIO(contents[f"{wheel.DIST_INFO}/RECORD"].decode())))
    assert [row[0] for row in rows].count(f"{wheel.DIST_INFO}/RECORD") == 1
    assert {row[0] for row in rows} == set(contents)
    for path, digest, size in rows[:-1]:
        raw = base64.urlsafe_b64decode(digest.removeprefix("sha256=") + "=")
        assert raw == hashlib.sha256(contents[path]).digest()
        assert int(size) == len(contents[path])


def test_metadata_names_licence_version_and_requirements(contents: dict[str, bytes]) -> None:
    text = contents[f"{wheel.DIST_INFO}/METADATA"].decode()
    assert f"\nName: detectron2\nVersion: {VERSION}\n" in text
    assert "Requires-Dist: iopath>=0.1.7,<0.1.10\n" in text
    assert "Apache License" in contents[f"{wheel.DIST_INFO}/licenses/LICENSE"].decode()
    assert b"Root-Is-Purelib: true\n" in contents[f"{wheel.DIST_INFO}/WHEEL"]


def test_equal_sources_give_equal_bytes(unpacked: Path, built: Path, tmp_path: Path) -> None:
    again = wheel.build_wheel(unpacked, into=tmp_path)
    assert again.name == built.name == wheel.WHEEL_NAME
    assert again.read_bytes() == built.read_bytes()


def test_the_installed_package_is_the_wheel(contents: dict[str, bytes]) -> None:
    try:
        distribution = metadata.distribution("detectron2")
    except metadata.PackageNotFoundError:
        pytest.skip("no Detectron2 is installed")
    if distribution.version != VERSION:
        pytest.skip(f"the installed Detectron2 {distribution.version} is not this repackaging")
    for path, content in contents.items():
        if not path.endswith("/RECORD"):
            assert Path(str(distribution.locate_file(path))).read_bytes() == content, path


@pytest.mark.filterwarnings("ignore")
def test_every_module_that_d2ctx_needs_can_be_imported() -> None:
    pytest.importorskip("detectron2")
    for name in MODULES:
        importlib.import_module(f"detectron2.{name}")
