"""The installer's decisions: what is kept, what is refused, where files come from."""

import io
import sys
import tarfile
from pathlib import Path

import pytest

from d2ctx.errors import UserError
from d2ctx.install import cli, compiled_stub, fetch, source
from d2ctx.install.installed import Installed, probe
from d2ctx.install.substitutions import Substitution, substitute


def archive(path: Path, *, member: str = "detectron2_cdo-0.5/file.py") -> Path:
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo(member)
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    return path


def fake_detectron2(folder: Path, *, body: str) -> None:
    """Write a package that the probe's interpreter finds before any installed one."""
    for name in ("", "data", "layers", "modeling"):
        package = folder / "detectron2" / name
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text("" if name else body)


def test_another_checksum_is_refused_before_anything_is_unpacked(tmp_path: Path) -> None:
    bad = archive(tmp_path / source.SDIST_NAME)
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(UserError, match=f"sha256 {source.SDIST_SHA256}, got {'[0-9a-f]' * 64}"):
        source.unpack(bad, into=target)
    assert list(target.iterdir()) == []


def test_members_that_leave_the_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "verify", lambda path: None)
    with pytest.raises(tarfile.OutsideDestinationError):
        source.unpack(archive(tmp_path / "a.tar.gz", member="../out.py"), into=tmp_path / "in")
    assert not (tmp_path / "out.py").exists()


def test_a_missing_archive_is_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--sdist", str(tmp_path / "none.tar.gz"), "--wheel-dir", str(tmp_path)]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no such file" in error
    assert "--sdist" in error


@pytest.mark.parametrize("version", ["0.5", "0.6", "0.5+ctxseg1", "0.5+ctxseg99", "0.5+cu111"])
def test_a_working_detectron2_is_kept(version: str) -> None:
    assert not cli.wanted(Installed(present=True, version="0.5", metadata_version=version))


def test_only_our_own_older_version_is_replaced() -> None:
    older = Installed(present=True, metadata_version="0.5+ctxseg0", error="ImportError: x")
    assert cli.wanted(older)
    assert cli.wanted(Installed(present=False))


@pytest.mark.parametrize(
    ("error", "library", "command"),
    [
        ("ModuleNotFoundError: No module named 'cv2'", "cv2", "install opencv-python-headless"),
        ("ModuleNotFoundError: No module named 'torch'", "torch", "pip install torch torchvision"),
        (
            "ImportError: numpy.core.multiarray failed to import",
            "cv2",
            "pip install --force-reinstall --no-deps opencv-python-headless",
        ),
        ("ImportError: _C.so: undefined symbol: _ZN3c10", "detectron2", "--no-build-isolation"),
        ("AttributeError: module 'PIL.Image' has no attribute 'LINEAR'", None, "pip uninstall"),
    ],
)
def test_a_broken_detectron2_is_left_alone_with_a_remedy(
    error: str, library: str | None, command: str
) -> None:
    missing = "No module" in error
    broken = Installed(
        present=True, metadata_version="0.6", error=error, library=library, missing=missing
    )
    with pytest.raises(UserError, match="nothing was changed") as caught:
        cli.wanted(broken)
    assert error in str(caught.value)
    assert command in str(caught.value)


def test_the_probe_reports_a_users_own_detectron2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_detectron2(tmp_path, body="print('noise')\n__version__ = '0.6'\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = probe()
    assert found.works
    assert found.version == "0.6"
    assert found.revision is None
    assert str(tmp_path) in found.describe()


def test_the_probe_reports_why_an_import_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_detectron2(tmp_path, body="raise ImportError('broken on purpose')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(cli, "install", lambda wheel: pytest.fail("pip must not run"))
    assert cli.main([]) == 2
    assert "ImportError: broken on purpose" in capsys.readouterr().err


def test_the_probe_names_the_library_at_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    fake_detectron2(tmp_path, body="import fake_cv2\n")
    found = probe()
    assert (found.library, found.missing) == ("fake_cv2", True)
    assert found.remedy() == "python -m pip install fake_cv2"
    (tmp_path / "fake_cv2.py").write_text("import ctypes; ctypes.CDLL('/no/libGL.so.1')")
    found = probe()
    assert (found.library, found.missing) == ("fake_cv2", False)
    assert found.remedy() == "python -m pip install --force-reinstall --no-deps fake_cv2"
    fake_detectron2(tmp_path, body="import json; json.LINEAR\n")
    assert probe().library == "detectron2"


def test_a_checkout_in_the_current_folder_is_no_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_detectron2(tmp_path / "checkout", body="raise ImportError('not this one')\n")
    fake_detectron2(tmp_path / "site", body="")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.chdir(tmp_path / "checkout")
    assert probe().works


def test_a_substitution_must_occur_exactly_as_often_as_listed() -> None:
    entry = Substitution(file="a.py", old="np.int)", new="int)", count=2, reason="gone")
    changed = substitute({"a.py": b"np.int) np.int)", "b.py": b""}, substitutions=(entry,))
    assert changed["a.py"].endswith(b"\nint) int)")
    assert changed["a.py"].startswith(b"# Changed by ctxseg")
    assert changed["b.py"] == b""
    for text in (b"np.int)", b"np.int) np.int) np.int)", b""):
        with pytest.raises(ValueError, match=r"expected 'np.int\)' 2 times in a.py, got"):
            substitute({"a.py": text}, substitutions=(entry,))
    with pytest.raises(ValueError, match="no such file"):
        substitute({"b.py": b""}, substitutions=(entry,))


def test_pip_settings_follow_pips_precedence() -> None:
    options = fetch.parse_pip_config(
        "global.index-url='https://a.example/simple'\n"
        "install.index-url='https://b.example/simple'\n"
        ":env:.index-url='https://user:secret@c.example/simple'\n"
        "global.extra-index-url='\\nfile:///srv/simple\\nhttps://d.example/simple'\n"
        "global.timeout='7'\nglobal.cert='/etc/ca.pem'\nnonsense\nfreeze.timeout='9'\n"
    )
    settings = fetch.index_settings(options)
    urls = fetch.index_urls(settings, default="https://default.example")
    assert urls == ["https://user:secret@c.example/simple", "https://d.example/simple"]
    assert fetch.without_password(urls[0]) == "https://***@c.example/simple"
    assert (settings.timeout, settings.cert) == (7.0, "/etc/ca.pem")


def test_without_configuration_pips_default_index_is_used() -> None:
    default = fetch.index_settings(fetch.parse_pip_config(""))
    assert fetch.index_urls(default, default="https://default.example") == [
        "https://default.example"
    ]
    offline = fetch.IndexSettings(no_index=True)
    assert fetch.index_urls(offline, default="https://default.example") == []


def test_every_index_is_tried_and_named_when_none_delivers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pypi_simple")
    asked: list[str] = []

    def refuse(url: str, **_: object) -> None:
        asked.append(url)
        raise ConnectionError("no route")

    monkeypatch.setattr(fetch, "_download_from", refuse)
    settings = fetch.IndexSettings(
        index_url="https://me:pw@a.example/s", extra_index_urls=("file:///x", "https://b.example/s")
    )
    with pytest.raises(UserError, match="no route") as caught:
        fetch.fetch_sdist(cache=tmp_path, settings=settings)
    assert asked == ["https://me:pw@a.example/s", "https://b.example/s"]
    assert "pw@" not in str(caught.value)
    assert "--sdist" in str(caught.value)


def test_a_wrong_download_never_reaches_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pypi_simple")
    monkeypatch.setattr(fetch, "_download_from", lambda url, *, target, settings: archive(target))
    with pytest.raises(UserError, match="nothing was unpacked"):
        fetch.fetch_sdist(cache=tmp_path, settings=fetch.IndexSettings())
    assert list(tmp_path.iterdir()) == []


def test_every_compiled_operator_of_the_stub_names_the_remedy() -> None:
    for name in ("box_iou_rotated", "deform_conv_forward", "InstanceAnnotation"):
        with pytest.raises(NotImplementedError, match="--no-build-isolation") as caught:
            getattr(compiled_stub, name)
        assert name in str(caught.value)
    assert not hasattr(compiled_stub, "__path__")
    assert not compiled_stub.has_cuda()
    assert "pure-Python" in compiled_stub.get_compiler_version() + compiled_stub.get_cuda_version()


def test_dry_run_installs_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "probe", lambda: Installed(present=False))
    monkeypatch.setattr(cli, "build", lambda **_: pytest.fail("nothing must be built"))
    monkeypatch.setattr(cli, "pip_settings", fetch.IndexSettings)
    assert cli.main(["--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "pip's default index" in out
    assert "ctxseg1-py3-none-any.whl" in out


def test_a_folder_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**_: object) -> Path:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(cli, "build", refuse)
    assert cli.main(["--wheel-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Permission denied" in error


def test_pip_failing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="exit code 1"):
        cli.install(Path("x.whl"))
