"""Who may import whom, by reading every import and by importing in fresh processes."""

import subprocess
import sys

import pytest

from tests.contracts.source_tree import PACKAGES, ROOT, files, imported_modules

FORBIDDEN = {
    "ctxops": {"d2ctx", "segtrain", "detectron2", "fvcore"},
    "d2ctx": {"segtrain", "projects", "tests", "benchmarks"},
    "segtrain": {"d2ctx", "detectron2", "fvcore", "projects", "tests", "benchmarks"},
}
# Method files of ctxops are built from primitives, never from each other.
METHOD_FILES = {"ctxops.a2fpn", "ctxops.fpt", "ctxops.sr", "ctxops.segmenter", "ctxops.unept"}


def roots(path) -> set[str]:
    return {name.split(".")[0] for name in imported_modules(path)}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_forbidden_import(package):
    for path in files(package):
        assert not roots(path) & FORBIDDEN[package], path


def test_ctxops_imports_only_torch_and_the_standard_library():
    allowed = set(sys.stdlib_module_names) | {"torch", "torchvision", "ctxops"}
    for path in files("ctxops"):
        # Kernels are written in Triton; nothing loads them before they are used (see below).
        extra = {"triton"} if path.parent.name == "kernels" else set()
        assert roots(path) <= allowed | extra, f"{path}: {roots(path) - allowed - extra}"


def test_importing_ctxops_loads_no_triton_and_no_kernels():
    # PyTorch may have loaded Triton by itself.
    code = (
        "import sys, torch, torchvision; before = set(sys.modules); "
        "import ctxops, ctxops.deform_attention; "
        "new = set(sys.modules) - before; "
        "new = {name for name in new if name.startswith(('triton', 'ctxops.kernels'))}; "
        "assert new == {'ctxops.kernels', 'ctxops.kernels.probe'}, new"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_method_files_do_not_import_each_other():
    for path in files("ctxops"):
        if path.name != "__init__.py" and f"ctxops.{path.stem}" in METHOD_FILES:
            assert not set(imported_modules(path)) & METHOD_FILES, path


def test_projects_folder_is_not_a_package():
    assert not list((ROOT / "projects").rglob("__init__.py"))


@pytest.mark.parametrize("module", ["ctxops", "segtrain", "segtrain.cli", "d2ctx"])
def test_importing_loads_no_detectron2_and_warns_of_nothing(module):
    code = (
        f"import sys, {module}; "
        "loaded = {'detectron2', 'fvcore'} & set(sys.modules); "
        "assert not loaded, loaded"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
