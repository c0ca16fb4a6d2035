"""Fixtures of several of the plug-in's tests."""

import pytest

from .launch import restored_loggers, write_launch
from .toy_coco import restored_catalogs


@pytest.fixture(autouse=True)
def _nothing_left():
    """Names of data sets and log levels are of the whole process: no test leaves its own there."""
    with restored_catalogs(), restored_loggers():
        yield


@pytest.fixture
def isolated(tmp_path, monkeypatch):
    """An image cache of the test's own, as catalogs and loggers are of every test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def launch(isolated, tmp_path):
    """A run that was not started yet."""
    return write_launch(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run that was trained and evaluated. Only to be read: all tests share it."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch, restored_catalogs(), restored_loggers():
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        launch = write_launch(folder)
        assert launch.main() == 0
    return launch
